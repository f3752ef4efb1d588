"""Jobs from configurations: the Slurm script, its submission, and the same task on this machine.

The scripts are compared with golden files, and some are submitted to a real Slurm (`tests/cluster/test_slurm.py`).
"""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from cluster.site import Site
from cluster.task import Task
from dataloaders.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How many processes run where; one task is one rank."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int

    @classmethod
    def from_options(cls, *, nodes: int, gpus_per_node: int | None, tasks_per_node: int | None) -> Placement:
        """One task per GPU, or `tasks_per_node` on machines without.

        Raises:
            UserError: numbers below 1, neither of the two given, or two that disagree.
        """
        for name, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node), ("tasks-per-node", tasks_per_node)):
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is not possible: give 1 or more, or leave it out")
        if gpus_per_node is None and tasks_per_node is None:
            raise UserError("the number of ranks is open: give --gpus-per-node G, or --tasks-per-node T without GPUs")
        if gpus_per_node is not None and tasks_per_node not in (None, gpus_per_node):
            raise UserError(
                f"--tasks-per-node {tasks_per_node} differs from --gpus-per-node {gpus_per_node}, but each GPU "
                "has one task: leave --tasks-per-node out"
            )
        tasks = tasks_per_node if gpus_per_node is None else gpus_per_node
        assert tasks is not None
        return cls(nodes=nodes, tasks_per_node=tasks, gpus_per_node=gpus_per_node or 0)

    @property
    def tasks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node


class _ScriptExecutor(SlurmExecutor):  # type: ignore[misc]
    """submitit's Slurm executor that also writes scripts where Slurm is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def sbatch_script(*, placement: Placement, site: Site, folder: Path, name: str, array: int | None = None) -> str:
    """The text that `sbatch` gets, for one job or an array of `array`; `folder` must be one that all nodes see."""
    executor = slurm_executor(placement=placement, site=site, folder=folder, name=name)
    if array is not None:
        executor.parameters["map_count"] = array
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit_slurm(task: Task, *, placement: Placement, site: Site, folder: Path, name: str) -> Any:
    """Submit and return submitit's job.

    Raises:
        UserError: no Slurm here, or `sbatch` refuses the job.
    """
    with slurm_refusals():
        return slurm_executor(placement=placement, site=site, folder=folder, name=name).submit(task)


@contextlib.contextmanager
def slurm_refusals() -> Iterator[None]:
    """Turn what submitit raises inside into a UserError of one sentence; no Slurm here is one as well."""
    require_slurm()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises.
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from None


def submit_local(task: Callable[[], object], *, placement: Placement, site: Site, folder: Path) -> Any:
    """Start the tasks on this machine in the background and return submitit's job.

    The site's `setup` commands are not run: they prepare a node for a process that here runs already.

    Raises:
        UserError: more than one node.
    """
    if placement.nodes != 1:
        raise UserError(f"--executor local has one machine, not {placement.nodes}: give --nodes 1")
    executor = LocalExecutor(folder, max_num_timeout=site.max_timeouts)
    executor.update_parameters(
        nodes=1,
        tasks_per_node=placement.tasks_per_node,
        gpus_per_node=placement.gpus_per_node,
        timeout_min=site.time_minutes,
        signal_delay_s=site.signal_delay_s,
    )
    with environment_variables(**site.env):
        return executor.submit(task)


def wait_local(job: Any) -> str | None:
    """Wait for a job of `submit_local`; None when every rank finished, else the first failure's last line and log."""
    job.wait()
    for rank in range(job.num_tasks):
        task = job.task(rank)
        # A rank without a result did not come to its end; asking submitit for it would wait for the file.
        if not task.paths.result_pickle.exists() or task.exception() is not None:
            lines = (task.stderr() or "").strip().splitlines()
            return f"{lines[-1] if lines else 'no message'} (rank {rank}, {task.paths.stderr})"
    return None


def require_slurm() -> None:
    """Raise a UserError where Slurm's commands are missing."""
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise UserError(
            f"there is no {' and no '.join(missing)} on this machine: submit from a login node of the cluster, "
            "look at the script with --dry-run, or train here with --executor local"
        )


def slurm_executor(*, placement: Placement, site: Site, folder: Path, name: str) -> Any:
    """submitit's executor with the settings of the site."""
    executor = _ScriptExecutor(folder, max_num_timeout=site.max_timeouts)
    # Since 22.05 srun does not inherit sbatch's --cpus-per-task; a lost rank must end the job, not hang the others.
    srun_args = ["--kill-on-bad-exit=1"]
    if site.cpus_per_task is not None:
        srun_args.append(f"--cpus-per-task={site.cpus_per_task}")
    executor.update_parameters(
        job_name=name,
        nodes=placement.nodes,
        ntasks_per_node=placement.tasks_per_node,
        gpus_per_node=placement.gpus_per_node or None,
        cpus_per_task=site.cpus_per_task,
        partition=site.partition,
        account=site.account,
        qos=site.qos,
        constraint=site.constraint,
        time=site.time_minutes,
        mem=None if site.memory_gb is None else f"{round(site.memory_gb * 1024)}M",
        signal_delay_s=site.signal_delay_s,
        setup=[f"export {key}={shlex.quote(value)}" for key, value in site.env.items()] + list(site.setup) or None,
        srun_args=srun_args,
        # Without it `scontrol requeue` is refused where the site sets JobRequeue=0.
        additional_parameters={"requeue": True},
    )
    return executor
