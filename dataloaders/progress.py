"""How far long work is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LOG_SECONDS = 10.0


class Progress:
    """A bar with rate and ETA on a terminal, a line every ten seconds elsewhere; both on stderr."""

    def __init__(self, total: int, unit: str, units: str | None = None) -> None:
        self._total, self._units = total, units or f"{unit}s"
        self._done = 0
        self._start = self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=unit, dynamic_ncols=True) if terminal else None

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._said >= _LOG_SECONDS:
            self._said = time.monotonic()
            rate = self._done / (self._said - self._start)
            eta = tqdm.format_interval((self._total - self._done) / rate)
            print(
                f"{self._done} of {self._total} {self._units}, {rate:.2f} {self._units}/s, ETA {eta}",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
