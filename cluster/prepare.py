"""Preparing a data set as a Slurm array: every task transcodes its share, a last job makes the shards."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from submitit.helpers import DelayedSubmission

from cluster.jobs import Job, new_folder, now, possible_folders, record
from cluster.site import Site
from cluster.submit import Placement, sbatch_script, slurm_executor, submission, submit_local, wait_local
from cluster.task import settle_requeue
from dataloaders.errors import UserError, describe_failure
from dataloaders.prepare_cli import add_prepare_arguments, run_prepare

_NAME = "rev2net-prepare"


@dataclass(frozen=True, slots=True)
class PrepareTask:
    """The callable of one job: `rev2net prepare` with these words. What is done already is not done again."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Raise SystemExit with a user's mistake as one sentence, or with the command's own status."""
        settle_requeue()
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """`rev2net prepare` in parts.

    Attributes:
        words: what `rev2net prepare` takes.
        out: the data set's folder, which the words name as well.
        tasks: parts.
        gpus: of each part.
        site: settings of the cluster.
        parent: where the job's folder is made.
    """

    words: tuple[str, ...]
    out: Path
    tasks: int
    gpus: int
    site: Site
    parent: Path

    def script(self) -> str:
        """The text that `sbatch` gets for the array."""
        folder = next(possible_folders(self.parent, _NAME))
        return sbatch_script(placement=self._placement, site=self.site, folder=folder, name=_NAME, array=self.tasks)

    def submit(self) -> tuple[Job, Path]:
        """Submit the array, and a job that makes the shards once every task has ended, well or not.

        The last job does what a failed task left undone, so that its log tells how the preparation ended.

        Returns:
            The job, and the log of the last job.

        Raises:
            UserError: `sbatch` refuses a job.
        """
        with new_folder(self.parent, _NAME) as folder, submission():
            array, last = (
                slurm_executor(placement=self._placement, site=self.site, folder=folder, name=_NAME) for _ in range(2)
            )
            parts = array.submit_array(self._shares())
            number = parts[0].job_id.split("_")[0]
            last.update_parameters(additional_parameters={"requeue": True, "dependency": f"afterany:{number}"})
            try:
                end = last.submit(PrepareTask(self.words))
            except RuntimeError:
                subprocess.run(["scancel", number], check=False)  # half a preparation is none
                raise
            job = self._job("slurm", [*(part.job_id for part in parts), end.job_id], now())
            record(folder, job)
            return job, end.paths.stdout

    def run_here(self) -> str | None:
        """The same on this machine, to try it: one share after another (each takes all cores), then the shards.

        Returns:
            None when the data set is made, else the last line of what went wrong.
        """
        ids: list[str] = []
        submitted = now()
        with new_folder(self.parent, _NAME) as folder:
            for task in (*self._shares(), PrepareTask(self.words)):
                job = submit_local(task, placement=self._placement, site=self.site, folder=folder)
                ids.append(job.job_id)
                record(folder, self._job("local", ids, submitted))
                failure = wait_local(job)
        said = [line for line in (job.stdout() or "").splitlines() if not line.startswith("submitit ")]
        print("\n".join(said))
        return failure

    @property
    def _placement(self) -> Placement:
        return Placement(nodes=1, tasks_per_node=1, gpus_per_node=self.gpus)

    def _shares(self) -> list[PrepareTask]:
        return [PrepareTask((*self.words, "--share", f"{n}/{self.tasks}")) for n in range(1, self.tasks + 1)]

    def _job(self, executor: Literal["slurm", "local"], ids: Sequence[str], submitted: str) -> Job:
        return Job(
            ids=tuple(ids),
            ranks=1,
            kind="prepare",
            name=_NAME,
            output=str(self.out.absolute()),
            executor=executor,
            submitted=submitted,
        )
