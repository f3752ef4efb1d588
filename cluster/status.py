"""How jobs stand, what they write, and how they are ended.

Slurm's accounting (`sacct`) is not everywhere, and `squeue` forgets a job when it has ended: how it ended is told by
what it left behind: the mark of a job that came to its end, the data set's `dataset.json`, and its log.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cluster.jobs import CONFIG, JobFolder
from cluster.task import FINISHED, STOPPED
from dataloaders.errors import UserError
from dataloaders.shards import MANIFEST

_STEP = re.compile(r"(step \d+/\d+) .*(ETA \S+)")
_CANCELLED = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT (?!.*DUE TO)")
"""Slurm's line about a job that its owner ended; that a step was cancelled it also says where a rank failed."""
_EXITED = re.compile(r"srun: error: \S+ tasks? (\d+)\b")
_TAIL_BYTES = 1 << 16
_LINE = 160
"""Characters of a job's last words in the table."""
_POLL_SECONDS, _ASK_SECONDS = 0.5, 10.0
"""Of `logs --follow`: between two looks at the file, and between two questions to Slurm."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a job stands.

    Attributes:
        state: Slurm's own word while the job is in the queue, else FINISHED, STOPPED or FAILED.
        progress: the last step of the training with its ETA, or the shares of a preparation that are done.
        detail: nodes and time, why it waits, or its last words.
        alive: whether it runs or waits.
    """

    state: str
    progress: str
    detail: str
    alive: bool


def read_statuses(jobs: Sequence[JobFolder]) -> list[Status]:
    """How each of the jobs stands.

    Raises:
        UserError: there are jobs of Slurm, but no `squeue` on this machine.
        RuntimeError: Slurm does not answer.
    """
    queue = _read_queue(number for each in jobs if each.job.executor == "slurm" for number in each.job.numbers)
    statuses = []
    for each in jobs:
        rows = [row for row in queue if row.number in each.job.numbers]
        here = [f"process {pid}" for pid in _processes(each)]
        if each.job.executor == "slurm" and rows:
            statuses.append(_queued(rows, _progress(each)))
        elif here:
            statuses.append(Status("RUNNING", _progress(each), ", ".join(here), alive=True))
        else:
            statuses.append(_ended(each))
    return statuses


def table(jobs: Sequence[JobFolder], statuses: Sequence[Status]) -> str:
    """One line for each job, under a line of headings."""
    rows = [("id", "job", "state", "progress", "")]
    for each, status in zip(jobs, statuses, strict=True):
        rows.append((each.job.id, each.path.name, status.state, status.progress, status.detail))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def show_log(job: JobFolder, rank: int, *, stderr: bool, follow: bool) -> None:
    """Write a rank's log to the standard output; with `follow` on and on until the job has ended.

    Raises:
        UserError: no such rank, or it has written nothing yet.
    """
    file = job.log(rank, "err" if stderr else "out")
    if not follow:
        if not file.exists():
            (status,) = read_statuses([job])
            raise UserError(f"rank {rank} of job {job.job.id} has written nothing: the job is {status.state}")
        with file.open(errors="replace") as text:
            shutil.copyfileobj(text, sys.stdout)
        return
    asked, alive = time.monotonic(), True
    with ExitStack() as stack:
        log: TextIO | None = None
        while True:
            if log is None and file.exists():
                log = stack.enter_context(file.open(errors="replace"))
            if log is not None:
                shutil.copyfileobj(log, sys.stdout)
                sys.stdout.flush()
            if not alive:  # asked before the last look at the file
                return
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - asked > _ASK_SECONDS:
                asked = time.monotonic()
                with suppress(RuntimeError):  # a controller that is busy is asked again
                    alive = read_statuses([job])[0].alive


def cancel(jobs: Sequence[JobFolder], known: Sequence[JobFolder]) -> None:
    """End jobs; a training saves its state first.

    Args:
        jobs: what to end.
        known: all jobs, to name those that can be ended.

    Raises:
        UserError: one of them is over, or prepares in the foreground; none of them is ended then.
    """
    for each, status in zip(jobs, read_statuses(jobs), strict=True):
        if not status.alive:
            alive = [k.job.id for k, s in zip(known, read_statuses(known), strict=True) if s.alive]
            raise UserError(
                f"job {each.job.id} is over ({status.state}): there is nothing to cancel; "
                + (f"running or waiting: {', '.join(alive)}" if alive else "no job runs or waits")
            )
        if each.job.executor == "local" and each.job.kind == "prepare":
            raise UserError(f"job {each.job.id} prepares in the foreground: end it by Ctrl-C where it was started")
    for each in jobs:
        if each.job.executor == "slurm":
            _ask_slurm("scancel", *each.job.numbers)
        for pid in _processes(each):
            os.kill(pid, signal.SIGTERM)  # submitit's controller, which passes it on to the ranks


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of `squeue`, with elements of arrays one by one."""

    number: str
    state: str
    nodes: str
    time: str
    reason: str


def _read_queue(numbers: Iterable[str]) -> list[_Row]:
    wanted = ",".join(numbers)
    if not wanted:
        return []
    text = _ask_slurm("squeue", "-h", "-r", "-j", wanted, "-o", "%F|%T|%N|%M|%r")
    return [_Row(*line.split("|", 4)) for line in text.splitlines()]


def _ask_slurm(*words: str) -> str:
    if shutil.which(words[0]) is None:
        raise UserError(f"there is no {words[0]} on this machine: ask on a login node of the cluster")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    # A single job that it has forgotten is an error to squeue; among several it is not.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise RuntimeError(f"Slurm does not answer: {' '.join(done.stderr.split()) or 'no message'}")
    return done.stdout


def _queued(rows: Sequence[_Row], progress: str) -> Status:
    counts = Counter(row.state for row in rows)
    state = "RUNNING" if "RUNNING" in counts else rows[0].state
    shown = [row for row in rows if row.state == state]
    if len(rows) > 1:
        detail = ", ".join(f"{number} {word.lower()}" for word, number in counts.items())
    elif state == "PENDING":
        detail = f"({shown[0].reason})"
    else:
        detail = f"{shown[0].nodes} {shown[0].time}"
    return Status(state, progress, detail, alive=True)


def _processes(each: JobFolder) -> list[int]:
    """Processes of this machine that lead a local job; a number that another program has got since is not one."""
    found = []
    for text in each.job.ids if each.job.executor == "local" else ():
        try:
            words = Path(f"/proc/{text}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(each.path) in words:
            found.append(int(text))
    return found


def _ended(each: JobFolder) -> Status:
    progress = _progress(each)
    if _is_finished(each):
        return Status("FINISHED", progress, each.job.output, alive=False)
    rank = len(each.job.ids) - 1 if each.job.kind == "prepare" else 0
    out, _ = _last_words(each.log(rank, "out"))
    err, slurm = _last_words(each.log(rank, "err"))
    if not out and not err and not slurm:
        return Status("STOPPED", progress, "ended before it wrote anything", alive=False)
    if out == STOPPED:
        return Status("STOPPED", progress, out, alive=False)
    if any(_CANCELLED.search(line) for line in slurm):
        return Status("STOPPED", progress, (err or out)[:_LINE], alive=False)
    culprit = next((int(found[1]) for line in slurm if (found := _EXITED.match(line))), 0)
    if culprit and each.job.kind != "prepare":
        err = f"rank {culprit}: {_last_words(each.log(culprit, 'err'))[0]}"
    return Status("FAILED", progress, (err or out or slurm[-1])[:_LINE], alive=False)


def _is_finished(each: JobFolder) -> bool:
    output = Path(each.job.output)
    if each.job.kind == "doctor":
        return (each.path / f"{each.job.id}_0_result.pkl").exists()
    if each.job.kind != "prepare":
        return any((each.path / f"{FINISHED}-{name}").exists() for name in each.job.ids)
    return (output / MANIFEST).exists() and (each.path / f"{each.job.ids[-1]}_0_result.pkl").exists()


def _runs_its_configuration(each: JobFolder) -> bool:
    """Whether what lies in the output folder is of this job: another may have written there, before or after."""
    written = Path(each.job.output) / "config.yaml"
    return written.exists() and written.read_text() == (each.path / CONFIG).read_text()


def _progress(each: JobFolder) -> str:
    if each.job.kind == "prepare":
        if each.job.executor == "local":
            return ""  # one after another, in the foreground
        shares = each.job.ids[:-1]
        done = sum((each.path / f"{name}_0_result.pkl").exists() for name in shares)
        return f"{done}/{len(shares)} shares"
    if each.job.kind == "sweep":
        return f"{len(list(Path(each.job.output).glob('*/train.log')))} runs begun"
    steps = _STEP.findall(_tail(Path(each.job.output) / "train.log")) if _runs_its_configuration(each) else []
    return " ".join(steps[-1]) if steps else ""


def _tail(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as data:
        data.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        return data.read().decode(errors="replace")


def _last_words(file: Path) -> tuple[str, list[str]]:
    """The last line that a rank wrote, and the lines that Slurm wrote after it."""
    lines = [line.strip() for line in _tail(file).splitlines() if line.strip()]
    slurm: list[str] = []
    while lines and lines[-1].startswith(("srun: ", "slurmstepd")):
        slurm.insert(0, lines.pop())
    return lines[-1] if lines else "", slurm
