"""Jobs from configurations: the Slurm script, its submission, and the same task on this machine.

The scripts are compared with golden files, and some are submitted to a real Slurm (`tests/cluster/test_slurm.py`).
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables
from submitit.helpers import clean_env
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor

from cluster.jobs import snapshot_environment
from cluster.site import Site
from cluster.task import REQUEUE, SETTLED, STOPPED
from dataloaders.errors import UserError

if TYPE_CHECKING:
    from rev2net.config import Config


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


def sbatch_script(
    *, placement: Placement, site: Site, folder: Path, name: str, array: int = 1, latest: Path | None = None
) -> str:
    """The text that `sbatch` gets, for one job or an array of `array`; `folder` is the job's, seen by all nodes."""
    executor = slurm_executor(placement=placement, site=site, folder=folder, name=name, latest=latest)
    if array > 1:  # submitit makes no array of a single task
        executor.parameters["map_count"] = array
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit_slurm(
    task: Callable[[], object],
    *,
    placement: Placement,
    site: Site,
    folder: Path,
    name: str,
    latest: Path | None = None,
) -> Any:
    """Submit and return submitit's job; arguments as of `slurm_executor`.

    Raises:
        UserError: `sbatch` refuses the job, or the partition has fewer nodes.
    """
    _check_nodes(placement, site)
    with submission():
        return slurm_executor(placement=placement, site=site, folder=folder, name=name, latest=latest).submit(task)


@contextlib.contextmanager
def submission() -> Iterator[None]:
    """Submit to Slurm inside: without the variables of a job that we are in, and what submitit raises as a UserError.

    Raises:
        UserError: `sbatch` refuses the job.
    """
    try:
        with _outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises.
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines()]
        raise UserError(f"sbatch refused the job: {'; '.join(filter(None, lines))}{_partitions()}") from None


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide what a new job must not inherit from the job, or the training, that submits it.

    Of a job in a shell of `srun --pty`, say, srun would bind the new tasks to the cores of the old ones, and all ranks
    would meet at a port that is taken. What users set for their own submissions stays.
    """
    own = ("SLURM_CONF", "SLURM_CLUSTERS", "SUBMITIT_PREEMPT_SIGNAL")
    kept = {name: value for name, value in os.environ.items() if name in own or name.startswith("SBATCH_")}
    with clean_env(), environment_variables(**kept):
        yield


def _check_nodes(placement: Placement, site: Site) -> None:
    """Slurm takes a job that is too large for its partition, and lets it wait for ever."""
    sizes = _partition_sizes()
    wanted = (site.partition or next((name for name in sizes if name.endswith("*")), "")).split(",")
    known = [nodes for name, nodes in sizes.items() if name in wanted or name.rstrip("*") in wanted]
    if known and placement.nodes > max(known):
        raise UserError(f"--nodes {placement.nodes} is more than there are{_partitions()}")


def _partition_sizes() -> dict[str, int]:
    """Nodes of each partition, the default one with a star; nothing where Slurm does not say."""
    if shutil.which("sinfo") is None:
        return {}
    listing = subprocess.run(["sinfo", "-h", "-o", "%P %D"], capture_output=True, text=True, check=False)
    rows = (line.split() for line in listing.stdout.splitlines())
    return {} if listing.returncode else {name: int(nodes) for name, nodes in rows}


def _partitions() -> str:
    """What the user could ask for instead, as the end of a sentence."""
    named = ", ".join(f"{name.rstrip('*')} ({nodes} nodes)" for name, nodes in _partition_sizes().items())
    return f"; the partitions here are {named}: change `partition` in the site file, or --nodes" if named else ""


def check_accelerator(placement: Placement, site: Site) -> None:
    """Raise a UserError where GPUs are asked for, and the environment, which travels with the job, passes over them."""
    if placement.gpus_per_node and {**os.environ, **site.env}.get("DS_ACCELERATOR") == "cpu":
        raise UserError(
            "DS_ACCELERATOR=cpu is set, with which no rank trains on the GPUs that --gpus-per-node asks for: unset it, "
            "or give --tasks-per-node to train on CPUs"
        )


def local_gpus(jobs: int, *, placement: Placement, site: Site) -> list[list[int]]:
    """This machine's GPUs for each of `jobs` jobs at once, of those that CUDA_VISIBLE_DEVICES allows.

    Raises:
        UserError: they are too few, or named by something else than numbers.
    """
    each = placement.gpus_per_node
    allowed = {**os.environ, **site.env}.get("CUDA_VISIBLE_DEVICES")
    if not each:
        return [[] for _ in range(jobs)]
    if allowed is None:
        from torch.cuda import device_count

        gpus, known = list(range(device_count())), "this machine has"
    else:
        known = f"CUDA_VISIBLE_DEVICES={allowed} allows"
        try:
            gpus = [int(word) for word in allowed.split(",") if word.strip()]
        except ValueError:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={allowed} has other names than numbers, which --executor local does not know: "
                "give the numbers that `nvidia-smi -L` shows"
            ) from None
    if len(gpus) < jobs * each:
        wanted = f"{each} GPUs" if jobs == 1 else f"{jobs} tasks of {each} GPUs"
        raise UserError(
            f"{wanted} at once are not possible, {known} {len(gpus)}: ask for fewer, or give --tasks-per-node T to "
            "train on CPUs"
        )
    return [gpus[number * each : (number + 1) * each] for number in range(jobs)]


def submit_local(
    task: Callable[[], object], *, placement: Placement, site: Site, folder: Path, gpus: Sequence[int] | None = None
) -> Any:
    """Start the tasks on this machine in the background and return submitit's job.

    Of the site, its time limit and `env` count: `setup` and `container` prepare a node for a process that here runs
    already. `gpus` is one of `local_gpus`, where several jobs run at once.

    Raises:
        UserError: as `local_gpus`.
    """
    assert placement.nodes == 1
    if gpus is None:
        (gpus,) = local_gpus(1, placement=placement, site=site)
    executor = LocalExecutor(folder, max_num_timeout=site.max_timeouts)
    executor.update_parameters(
        nodes=1,
        tasks_per_node=placement.tasks_per_node,
        gpus_per_node=placement.gpus_per_node,
        visible_gpus=gpus,
        timeout_min=site.time_minutes,
        signal_delay_s=site.signal_delay_s,
    )
    environment = {**site.env, **snapshot_environment(folder)}
    older = site.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    if older:
        environment["PYTHONPATH"] += f":{older}"
    with _outside_of_jobs(), environment_variables(**environment):
        return executor.submit(task)


def wait_local(job: Any) -> str | None:
    """Wait for a job of `submit_local`; None when every rank finished, else the first failure's last line and log."""
    job.wait()
    for rank in range(job.num_tasks):
        task = job.task(rank)
        # A rank without a result did not come to its end; asking submitit for it would wait for the file.
        if not task.paths.result_pickle.exists() or task.exception() is not None:
            if STOPPED in (task.stdout() or ""):
                return STOPPED
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


def slurm_executor(*, placement: Placement, site: Site, folder: Path, name: str, latest: Path | None = None) -> Any:
    """submitit's executor with the settings of the site, for a job in `folder`.

    Args:
        latest: file whose text changes with each checkpoint: where a rank dies and it has changed since the job's last
            start, the job requeues itself. (So what fails each time at the same place ends the job.)
    """
    python = shlex.quote(site.python or sys.executable)
    command = python if site.container is None else f"{site.container} {python}"
    executor = _ScriptExecutor(folder, max_num_timeout=site.max_timeouts, python=command)
    # A lost rank must end the job, not hang the others; with SBATCH_EXPORT=NONE in the environment srun would keep from
    # the tasks what the script exports; and since 22.05 it does not inherit sbatch's --cpus-per-task.
    srun_args = ["--kill-on-bad-exit=1", "--export=ALL"]
    if site.cpus_per_task is not None:
        srun_args.append(f"--cpus-per-task={site.cpus_per_task}")
    begin, end = _requeue_lines(folder, latest)
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
        wckey=site.wckey,
        setup=[*_exports(site.env), *site.setup, *_snapshot_exports(folder), *begin],
        teardown=end,
        srun_args=srun_args,
        # Without it `scontrol requeue` is refused where the site sets JobRequeue=0.
        additional_parameters={"requeue": True},
    )
    return executor


def latest_of(config: Config) -> Path:
    """The file of a training's folder that names its last checkpoint."""
    return Path(config.output).absolute() / "checkpoints" / "latest"  # of rev2net.checkpoint, which imports PyTorch


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _snapshot_exports(folder: Path) -> list[str]:
    variables = snapshot_environment(folder)
    path = shlex.quote(variables.pop("PYTHONPATH"))
    return [f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}", *_exports(variables)]


def _requeue_lines(folder: Path, latest: Path | None) -> tuple[list[str], list[str]]:
    """Begin and end of a script that puts its job back into the queue.

    It does where a task asks for it that has no scontrol, as in most containers (see `task.settle_requeue`), and where
    a rank died and `latest` has changed, so that the next start gets further.
    """
    # Of one task of an array SLURM_JOB_ID is the number of the array, which stands for all of them.
    name = "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}"
    asked, settled = (f"{shlex.quote(str(folder.absolute() / what))}-$job" for what in (REQUEUE, SETTLED))
    again = "again() { for try in 1 2 3 4 5 6 7 8 9 10; do scontrol requeue $job && break; sleep 5; done; }"
    begin, end = [name, again], ["status=$?", f"if rm {asked} 2> /dev/null; then again"]
    if latest is not None:
        text = f"$(cat {shlex.quote(str(latest))} 2> /dev/null)"
        begin += [f"rm -f {settled}", f'saved="{text}"']
        end += [
            f'elif [ $status -ne 0 ] && [ ! -e {settled} ] && [ "{text}" != "$saved" ]; then',
            f'  echo "a rank ended with status $status, the training goes on from {text}"; again',
        ]
    return begin, [*end, "fi", "exit $status"]
