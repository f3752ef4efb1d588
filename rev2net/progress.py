"""What a person sees of a running training: a log line every N steps, a bar on a terminal, a trace on request."""

from __future__ import annotations

import logging
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rev2net.config import parse_range
from rev2net.distributed import Ranks

log = logging.getLogger("rev2net")


SHOWN_WAIT = 0.05
"""The rank that waits for data the longest is named from this share of the time on."""


def duration(seconds: float) -> str:
    """'1h02m', '3m20s' or '12s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class StepLog:
    """Averages the scalars of the last N steps and writes them as one line, on rank 0.

    Args:
        begun: `begun` of the run that goes on, for the steps that no line has told of.
    """

    def __init__(
        self, *, total: int, first: int, batch: int, every: int, ranks: Ranks, begun: Mapping[str, Any] | None = None
    ) -> None:
        self._total, self._batch, self._every, self._ranks = total, batch, every, ranks
        self._sums: dict[str, float] = dict(begun["sums"]) if begun else {}
        self._finite = int(begun["steps"]) if begun else 0
        self._count = 0
        self._waited = 0.0
        self._since = time.perf_counter()
        self._pace: float | None = None
        terminal = ranks.first and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit="step", desc="train") if terminal else None

    @property
    def begun(self) -> dict[str, Any]:
        """The sums of the steps since the last line, and their number."""
        return {"sums": dict(self._sums), "steps": self._finite}

    def add(self, step: int, scalars: Mapping[str, float], rate: float, waited: float) -> dict[str, float] | None:
        """Take one step's scalars; every N-th time, and at the last step, return and write the averages.

        Args:
            step: steps done, this one included.
            scalars: the objective's named values; none of a skipped step, which counts for the speed alone.
            rate: learning rate of this step.
            waited: seconds that the loop has waited for data since the start.
        """
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._finite += bool(scalars)
        if self._bar is not None:
            self._bar.update()
        if step % self._every and step != self._total:
            return None
        elapsed = time.perf_counter() - self._since
        values = {name: value / self._finite for name, value in self._sums.items()}
        # A step takes as long as on the rank that waits the longest.
        own = (waited - self._waited) / elapsed, memory_gib(self._ranks.device), socket.gethostname()
        shares, memories, hosts = zip(*self._ranks.gather(own), strict=True)
        most = max(shares)
        worst = shares.index(most)
        slowest = f" ({most:.1%} on rank {worst}, {hosts[worst]})" if len(shares) > 1 and most >= SHOWN_WAIT else ""
        values |= {
            "lr": rate,
            "step_seconds": elapsed / self._count,
            "data_wait_share": sum(shares) / len(shares),
            "data_wait_share_max": most,
            "clips_per_second": self._batch * self._count / elapsed,
            "memory_gib": max(memories),
        }
        # The first interval holds the start-up of everything: it would spoil the estimate of the rest.
        seconds = values["step_seconds"]
        self._pace = seconds if self._pace is None else 0.7 * self._pace + 0.3 * seconds
        self._write(step, values, slowest)
        self._sums, self._count, self._finite, self._waited, self._since = {}, 0, 0, waited, time.perf_counter()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no part of the steps."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def _write(self, step: int, values: Mapping[str, float], slowest: str) -> None:
        shown = {n: v for n, v in values.items() if n.startswith(("loss/", "domain/", "train/"))}
        losses = " ".join(f"{name.removeprefix('loss/')} {value:.4f}" for name, value in shown.items())
        assert self._pace is not None
        line = (
            f"step {step}/{self._total} ({step / self._total:.0%})  {losses}  lr {values['lr']:.2e}  "
            f"{values['step_seconds']:.3f} s/step  wait {values['data_wait_share']:.1%}{slowest}  "
            f"{values['clips_per_second']:.1f} clips/s  {values['memory_gib']:.2f} GiB  "
            f"ETA {duration((self._total - step) * self._pace)}"
        )
        if self._bar is not None:
            self._bar.clear()
        log.info("%s", line)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class Profile:
    """`profile.steps=20-30`: a torch.profiler trace of these steps of rank 0, written to the run's folder.

    Raises:
        UserError: not of the form FIRST-LAST.
    """

    def __init__(self, steps: str | None, folder: Path) -> None:
        self._folder = folder
        self._range = None if steps is None else parse_range(steps, "profile.steps")
        self._profiler: Any = None

    def step(self, done: int) -> None:
        """After each step: start before the first of the range, stop after the last."""
        if self._range is None:
            return
        first, last = self._range
        if done == max(1, first - 1):
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        elif done >= last:
            self.close()

    def close(self) -> None:
        """Write the trace if one is running."""
        if self._profiler is None:
            return
        self._profiler.stop()
        file = self._folder / "profile.trace.json"
        self._profiler.export_chrome_trace(str(file))
        log.info("wrote %s (open it at ui.perfetto.dev or chrome://tracing)", file)
        self._profiler = None
        self._range = None
