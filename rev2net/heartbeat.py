"""Nothing hangs silently: every rank shows a sign of life, and one that makes no progress is named.

A thread of each rank writes `heartbeat/rank-00003.json` in the run's folder: how far its training is, what it is
doing, and, once that has not changed for long, where all of its threads stand. Rank 0 (rank 1 where rank 0 shows no
sign of life) reads the files of all. When no rank has made progress for `train.hang_minutes`, the ranks that are
behind the others are named, with their stacks, or with the state of their process where that shows no sign of life;
then the process ends, and the launcher or Slurm ends the rest. Ranks go through the same sequence of things to do, so
whoever stands earliest in it is the one that the others wait for.

Files, and not the process group's own store: the store lives in one of the processes that may be stuck. No clocks are
compared: each watcher looks how long nothing has changed on its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataloaders.shards import write_atomically
from rev2net.distributed import FIRST_STEP_TIMEOUT, Ranks

log = logging.getLogger("rev2net")

_SUSPENDED = 5
"""Intervals without a look of its own after which a watcher knows that its process was suspended, by Slurm say."""
_LONGEST_INTERVAL = 30.0
"""Seconds between two signs of life, at most: a thousand ranks share the file system."""


@dataclass(slots=True)
class _Seen:
    """What a watcher knows of a rank: its last sign of life, and when (on the watcher's clock) what last changed."""

    sign: dict[str, Any]
    alive: float
    progress: float


class Heartbeat:
    """This rank's signs of life, and the watch over all ranks. Use as a context manager.

    Args:
        ranks: this process's place.
        folder: `heartbeat` in the run's folder, which all ranks see.
        limit: seconds without progress of any rank that end the run; 0 is off. Until `first_step_done` is called it
            is at least `FIRST_STEP_TIMEOUT`: compilation and cold storage take their time.
        on_hang: called by the watcher with the message, before the process ends.
    """

    def __init__(self, ranks: Ranks, folder: Path, limit: float, on_hang: Callable[[str], None]) -> None:
        self._ranks, self._folder, self._on_hang = ranks, folder, on_hang
        self._limit = limit
        self._interval = min(_LONGEST_INTERVAL, limit / 10)
        self._patience = max(limit, FIRST_STEP_TIMEOUT.total_seconds())
        self._place = self._moves = 0
        self._doing = "starts"
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def beat(self, doing: str) -> None:
        """The training goes on to the next thing that all ranks do, such as "waits for clips of step 12"."""
        self._place += 1
        self._moves += 1
        self._doing = doing

    def move(self) -> None:
        """Progress inside of that, which one rank may make more often than another."""
        self._moves += 1

    def first_step_done(self) -> None:
        """From now on the configured limit counts."""
        self._patience = self._limit

    def __enter__(self) -> Heartbeat:
        if self._limit:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._limit:
            self._thread.join()
            self._file(self._ranks.rank).unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _run(self) -> None:
        begin = time.monotonic()
        own = (-1, begin)
        seen = [_Seen({}, begin, begin) for _ in range(self._ranks.world_size)] if self._ranks.rank < 2 else []
        tick, last = 0, begin
        while not self._ended.wait(self._interval):
            tick += 1
            now = time.monotonic()
            if now - last > _SUSPENDED * self._interval:  # nobody can have made progress in a time that was none
                own = (own[0], now)
                seen = [replace(known, alive=now, progress=now) for known in seen]
            last = now
            if own[0] != self._moves:
                own = (self._moves, now)
            sign = self._sign(tick, with_stacks=now - own[1] >= self._patience)
            with contextlib.suppress(OSError):  # a full disk must not end the watch
                write_atomically(self._file(self._ranks.rank), json.dumps(sign).encode())
            if not seen:
                continue
            for rank, known in enumerate(seen):
                if rank != self._ranks.rank:
                    self._look(rank, known)
            # From memory: on a full disk no file says that the training goes on.
            seen[self._ranks.rank] = _Seen(sign, alive=now, progress=own[1])
            if self._hangs(seen) and (self._ranks.first or self._silent(seen[0])):
                self._end(seen)

    def _sign(self, tick: int, *, with_stacks: bool) -> dict[str, Any]:
        sign = {"tick": tick, "place": self._place, "moves": self._moves, "doing": self._doing, "pid": os.getpid()}
        return sign | {"host": socket.gethostname(), "stacks": stacks(self._main) if with_stacks else ""}

    def _look(self, rank: int, known: _Seen) -> None:
        try:
            sign = json.loads(self._file(rank).read_bytes())
        except (OSError, ValueError):
            return
        now, before = time.monotonic(), known.sign
        if (sign["pid"], sign["tick"]) != (before.get("pid"), before.get("tick")):
            known.alive = now
        if (sign["pid"], sign["moves"]) != (before.get("pid"), before.get("moves")):
            known.progress = now
        known.sign = sign

    def _hangs(self, seen: list[_Seen]) -> bool:
        # Some intervals more, in which every rank that can writes where it stands.
        return time.monotonic() - max(known.progress for known in seen) >= self._patience + 3 * self._interval

    def _silent(self, known: _Seen) -> bool:
        return time.monotonic() - known.alive >= 5 * self._interval

    def _end(self, seen: list[_Seen]) -> None:
        message = f"no rank has made progress for {self._patience:.0f} s (train.hang_minutes): " + self._who(seen)
        log.critical("%s", message)
        with contextlib.suppress(Exception):
            self._on_hang(message)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(1)  # the main thread is stuck, and whatever cleans up may be so too

    def _who(self, seen: list[_Seen]) -> str:
        """The ranks that the others wait for."""
        silent = [rank for rank, known in enumerate(seen) if self._silent(known)]
        least = min(known.sign.get("place", -1) for known in seen)
        behind = silent or [rank for rank, known in enumerate(seen) if known.sign.get("place", -1) == least]
        if len(behind) == len(seen) > 1:
            return f"all {len(seen)} ranks stand at the same place; {self._report(0, seen[0])}"
        return "; ".join(self._report(rank, seen[rank]) for rank in behind)

    def _report(self, rank: int, known: _Seen) -> str:
        sign = known.sign
        if not sign:
            return f"rank {rank} has shown no sign of life since the start"
        place = f"rank {rank} (process {sign['pid']} on {sign['host']}) {sign['doing']}"
        if not self._silent(known):
            return f"{place}, it stands at\n{sign['stacks']}"
        return f"{place}, and its process {process_state(sign['host'], sign['pid'])}"


def stacks(main: int) -> str:
    """Where every Python thread of this process stands, the main one first; this one is left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main)
    return "".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != threading.get_ident()
    )


def process_state(host: str, pid: int) -> str:
    """What the kernel says of a silent process, if it is one of this machine."""
    if host != socket.gethostname():
        return "shows no sign of life: look at that machine"
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "is gone"
    state = next((line.split(maxsplit=1)[1] for line in status.splitlines() if line.startswith("State:")), "unknown")
    return f"does not run: its state is {state}"
