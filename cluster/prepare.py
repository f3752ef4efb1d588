"""Preparing a data set as a Slurm array: every task transcodes its share, a last job makes the shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import environment_variables
from submitit.helpers import DelayedSubmission
from submitit.local.local import LocalExecutor

from cluster.site import Site
from cluster.submit import Placement, slurm_executor, slurm_refusals
from dataloaders.errors import UserError
from dataloaders.prepare_cli import add_prepare_arguments, run_prepare


@dataclass(frozen=True, slots=True)
class PrepareTask:
    """The callable of one job: `rev2net prepare` with these words. What is done already is not done again."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Raise SystemExit with a user's mistake as one sentence, or with the command's own status."""
        parser = argparse.ArgumentParser(prog="rev2net prepare")
        add_prepare_arguments(parser)
        try:
            status = run_prepare(parser.parse_args(self.words))
        except UserError as error:
            sys.exit(f"rev2net-cluster: {error}")
        except (OSError, RuntimeError) as error:
            sys.exit(f"rev2net-cluster: preparation failed: {error}")
        if status:
            sys.exit(status)

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook at a time limit or preemption: the same words again."""
        return DelayedSubmission(self)


def shares(words: Sequence[str], tasks: int) -> list[PrepareTask]:
    """One task for each of `tasks` parts."""
    return [PrepareTask((*words, "--share", f"{number}/{tasks}")) for number in range(1, tasks + 1)]


def array_script(*, tasks: int, gpus: int, site: Site, folder: Path) -> str:
    """The text that `sbatch` gets for the array; `gpus` is the number of each task."""
    executor = _executor(gpus, site, folder)
    executor.parameters["map_count"] = tasks
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit_array(words: Sequence[str], *, tasks: int, gpus: int, site: Site, folder: Path) -> tuple[Any, Any]:
    """Submit the array, and a job that makes the shards once every task has ended, well or not.

    The last job does what a failed task left undone, so that its log tells how the preparation ended.

    Returns:
        submitit's jobs: the first of the array, and the last.

    Raises:
        UserError: no Slurm here, or `sbatch` refuses a job.
    """
    with slurm_refusals():
        array = _executor(gpus, site, folder).submit_array(shares(words, tasks))
        last = _executor(gpus, site, folder)
        dependency = f"afterany:{array[0].job_id.split('_')[0]}"
        last.update_parameters(additional_parameters={"requeue": True, "dependency": dependency})
        return array[0], last.submit(PrepareTask(tuple(words)))


def run_local(words: Sequence[str], *, tasks: int, gpus: int, site: Site, folder: Path) -> str | None:
    """The same on this machine, to try it: one share after another (each takes all cores), then the shards.

    Returns:
        None when the data set is made, else the last line of what went wrong.
    """
    executor = LocalExecutor(folder)
    executor.update_parameters(timeout_min=site.time_minutes, gpus_per_node=gpus)
    with environment_variables(**site.env):
        for task in shares(words, tasks):
            executor.submit(task).wait()
        last = executor.submit(PrepareTask(tuple(words)))
    last.wait()
    said = [line for line in (last.stdout() or "").splitlines() if not line.startswith("submitit ")]
    print("\n".join(said))
    if last.paths.result_pickle.exists() and last.exception() is None:
        return None
    lines = (last.stderr() or "").strip().splitlines()
    return f"{lines[-1] if lines else 'no message'} ({last.paths.stderr})"


def _executor(gpus: int, site: Site, folder: Path) -> Any:
    placement = Placement(nodes=1, tasks_per_node=1, gpus_per_node=gpus)
    return slurm_executor(placement=placement, site=site, folder=folder, name="rev2net-prepare")
