"""The folder of a job: the code and the configuration it runs, its logs, and `job.json`, by which it is found again.

A job runs the snapshot `code/` in its folder. So editing the checkout while the job waits, or between two of its
starts, changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Literal

from dataloaders.errors import UserError
from dataloaders.shards import write_atomically
from rev2net.tracking import source_commit

CODE, CONFIG, RECORD = "code", "config.yaml", "job.json"
_PACKAGES = ("cluster", "rev2net", "dataloaders")
_NAMED = 5
"""Jobs that a sentence about an unknown one names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A submitted job, as its folder's `job.json` has it.

    Attributes:
        ids: submitit's ids: one of a training; of a preparation one of each share and that of the last job; of a sweep
            one of each task. Slurm's job number (with _INDEX in an array), or the number of a process.
        ranks: processes that each id stands for.
        kind: what it does.
        name: the job's name in the queue.
        output: absolute path of the run's output folder, or of the data set.
        executor: where it runs.
        submitted: local time, ISO 8601.
    """

    ids: tuple[str, ...]
    ranks: int
    kind: Literal["train", "prepare", "sweep", "doctor"]
    name: str
    output: str
    executor: Literal["slurm", "local"]
    submitted: str

    @property
    def id(self) -> str:
        """What names the job: Slurm's number of it (of a preparation: the array's)."""
        return self.numbers[0]

    @property
    def numbers(self) -> tuple[str, ...]:
        """What `squeue` and `scancel` know the job by."""
        return tuple(dict.fromkeys(text.partition("_")[0] for text in self.ids))


@dataclass(frozen=True, slots=True)
class JobFolder:
    """A job and where it lies."""

    path: Path
    job: Job

    def log(self, rank: int, suffix: Literal["out", "err"]) -> Path:
        """The file that a rank's standard output or error goes to; of a preparation the ranks are shares.

        Raises:
            UserError: there is no such rank.
        """
        ranks = len(self.job.ids) * self.job.ranks
        if not 0 <= rank < ranks:
            raise UserError(f"--rank {rank} is not possible: job {self.job.id} has the ranks 0 to {ranks - 1}")
        index, task = divmod(rank, self.job.ranks)
        return self.path / f"{self.job.ids[index]}_{task}_log.{suffix}"


def possible_folders(parent: Path, name: str) -> Iterator[Path]:
    """Absolute paths for a new job, from the best on: its name and the time, then with a number after it."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    yield parent.absolute() / stem
    for number in count(2):
        yield parent.absolute() / f"{stem}-{number}"


@contextlib.contextmanager
def new_folder(parent: Path, name: str, config: str | None = None) -> Iterator[Path]:
    """Make the folder of a new job: the code as it is now, and the configuration; removed if the job is refused.

    Raises:
        OSError: it cannot be written.
    """
    for path in possible_folders(parent, name):
        # Two jobs may be submitted in one second.
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    for package in _PACKAGES:
        source = Path(__file__).resolve().parents[1] / package
        shutil.copytree(source, path / CODE / package, ignore=shutil.ignore_patterns("__pycache__"))
    if config is not None:
        (path / CONFIG).write_text(config)
    try:
        yield path
    except UserError:
        shutil.rmtree(path)
        raise


def snapshot_environment(folder: Path) -> dict[str, str]:
    """What makes the processes of a job run the snapshot in its folder, and know the commit that it is of.

    PYTHONPATH is to be put before one that is set already.
    """
    commit = source_commit()
    # Without PYTHONSAFEPATH `python -m` would look into the working directory first, which often is the checkout.
    known = {"PYTHONPATH": str(folder / CODE), "PYTHONSAFEPATH": "1"}
    return known if commit is None else {**known, "REV2NET_COMMIT": commit}


def record(folder: Path, job: Job) -> None:
    """Write `job.json`."""
    write_atomically(folder / RECORD, json.dumps(asdict(job), indent=1).encode())


def now() -> str:
    """The time of submission, as `Job` wants it."""
    return datetime.now().isoformat(timespec="milliseconds")


def read_jobs(parent: Path) -> list[JobFolder]:
    """All jobs whose folders lie in `parent`, the newest last."""
    found = []
    for file in parent.glob(f"*/{RECORD}"):
        tree = json.loads(file.read_text())
        found.append(JobFolder(file.parent.absolute(), Job(**{**tree, "ids": tuple(tree["ids"])})))
    return sorted(found, key=lambda each: each.job.submitted)


def select(jobs: Sequence[JobFolder], words: Sequence[str], parent: Path) -> list[JobFolder]:
    """The jobs that are named, by an id or by the name of their folder; all jobs where no word is given.

    Raises:
        UserError: a word names none of them.
    """
    if not words:
        return list(jobs)
    # Slurm's numbers, and those of processes, come round again: the newest counts.
    named = {key: each for each in jobs for key in (*each.job.numbers, each.path.name)}
    tasks = {key: (each, rank * each.job.ranks) for each in jobs for rank, key in enumerate(each.job.ids)}
    for word in words:
        if word not in named and word in tasks:
            whole, rank = tasks[word]
            raise UserError(
                f"{word} is a task of job {whole.job.id}: give {whole.job.id} for all of them; its log is that of "
                f"--rank {rank}, and `scancel {word}` ends it alone"
            )
        if word not in named:
            known = ", ".join(f"{each.job.id} ({each.path.name})" for each in reversed(jobs[-_NAMED:]))
            raise UserError(
                f"there is no job {word!r} in {parent}: "
                + (f"the newest there are {known}" if known else "no job is, give the --folder it was submitted with")
            )
    return list(dict.fromkeys(named[word] for word in words))
