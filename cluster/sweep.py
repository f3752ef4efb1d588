"""The search for the loss weights as a Slurm array: every task does runs of one sweep until none is left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.jobs import Job, new_folder, now, possible_folders, record
from cluster.site import Site
from cluster.submit import (
    Placement,
    local_gpus,
    sbatch_script,
    slurm_executor,
    submission,
    submit_local,
    wait_local,
)
from cluster.task import StopRequested, Task, check_gpus, log_to_stdout
from rev2net.config import Config
from rev2net.grid import Search


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepWork:
    """What each task does; several do it at once.

    Attributes:
        config: as `sweep_config` gives it.
        search: the grids.
    """

    config: Config
    search: Search

    def __call__(self, stop_requested: StopRequested) -> bool:
        """Do runs until none is left anywhere, or a stop is requested on any rank."""
        from rev2net.sweep import sweep

        log_to_stdout()
        check_gpus()
        ended = sweep(self.config, self.search, stop_requested=stop_requested)
        if ended is not None and os.environ["RANK"] == "0":
            print(f"{ended.table}\n\nwinner {' '.join(ended.winner)}", flush=True)
        return ended is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepArray:
    """A sweep as an array.

    Attributes:
        work: what each task does.
        name: of the job.
        tasks: of the array.
        placement: the ranks of each task.
        site: settings of the cluster.
        parent: where the job's folder is made.
    """

    work: SweepWork
    name: str
    tasks: int
    placement: Placement
    site: Site
    parent: Path

    def script(self) -> str:
        """The text that `sbatch` gets."""
        folder = next(possible_folders(self.parent, self.name))
        return sbatch_script(placement=self.placement, site=self.site, folder=folder, name=self.name, array=self.tasks)

    def submit(self) -> tuple[Job, Path]:
        """Submit the array.

        Returns:
            The job, and the log of its first task.

        Raises:
            UserError: `sbatch` refuses it.
        """
        with new_folder(self.parent, self.name, self.work.config.yaml()) as folder, submission():
            executor = slurm_executor(placement=self.placement, site=self.site, folder=folder, name=self.name)
            jobs = executor.submit_array([Task(work=self.work) for _ in range(self.tasks)])
            job = self._record("slurm", jobs, folder)
            return job, jobs[0].task(0).paths.stdout

    def run_here(self) -> str | None:
        """The same on this machine, all tasks at once.

        Returns:
            None when the sweep has come to its end, else the last line of what went wrong.
        """
        with new_folder(self.parent, self.name, self.work.config.yaml()) as folder:
            task = Task(work=self.work)
            jobs = [
                submit_local(task, placement=self.placement, site=self.site, folder=folder, gpus=gpus)
                for gpus in local_gpus(self.tasks, placement=self.placement, site=self.site)
            ]
            self._record("local", jobs, folder)
        failures = [wait_local(job) for job in jobs]
        # The others have done what a task that failed has left.
        return None if None in failures else failures[0]

    def _record(self, executor: Literal["slurm", "local"], jobs: Sequence[Any], folder: Path) -> Job:
        job = Job(
            ids=tuple(job.job_id for job in jobs),
            ranks=self.placement.tasks,
            kind="sweep",
            name=self.name,
            output=str(Path(self.work.config.output).absolute()),
            executor=executor,
            submitted=now(),
        )
        record(folder, job)
        return job
