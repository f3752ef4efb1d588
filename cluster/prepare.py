"""Preparing a data set as a Slurm array: every task transcodes its share, a last job makes the shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from cluster.site import Site
from cluster.submit import Placement, sbatch_script, slurm_executor, slurm_refusals, submit_local, wait_local
from dataloaders.errors import UserError, describe_failure
from dataloaders.prepare_cli import add_prepare_arguments, run_prepare

_NAME = "rev2net-prepare"


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
            sys.exit(f"rev2net-cluster: preparation failed: {describe_failure(error)}")
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
    return sbatch_script(placement=_placement(gpus), site=site, folder=folder, name=_NAME, array=tasks)


def submit_array(words: Sequence[str], *, tasks: int, gpus: int, site: Site, folder: Path) -> tuple[Any, Any]:
    """Submit the array, and a job that makes the shards once every task has ended, well or not.

    The last job does what a failed task left undone, so that its log tells how the preparation ended.

    Returns:
        submitit's jobs: the first of the array, and the last.

    Raises:
        UserError: no Slurm here, or `sbatch` refuses a job.
    """
    with slurm_refusals():
        array, last = (
            slurm_executor(placement=_placement(gpus), site=site, folder=folder, name=_NAME) for _ in range(2)
        )
        jobs = array.submit_array(shares(words, tasks))
        dependency = f"afterany:{jobs[0].job_id.split('_')[0]}"
        last.update_parameters(additional_parameters={"requeue": True, "dependency": dependency})
        return jobs[0], last.submit(PrepareTask(tuple(words)))


def run_local(words: Sequence[str], *, tasks: int, gpus: int, site: Site, folder: Path) -> str | None:
    """The same on this machine, to try it: one share after another (each takes all cores), then the shards.

    Returns:
        None when the data set is made, else the last line of what went wrong.
    """
    for task in (*shares(words, tasks), PrepareTask(tuple(words))):
        job = submit_local(task, placement=_placement(gpus), site=site, folder=folder)
        failure = wait_local(job)
    said = [line for line in (job.stdout() or "").splitlines() if not line.startswith("submitit ")]
    print("\n".join(said))
    return failure


def _placement(gpus: int) -> Placement:
    return Placement(nodes=1, tasks_per_node=1, gpus_per_node=gpus)
