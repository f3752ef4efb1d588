"""How many clips that cannot be decoded a training puts up with."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 1000
"""Clips over which the share of bad ones is taken."""

LEAST = 5
"""Fewer bad clips than this never end a run."""

DEVIATIONS = 4.0
"""Standard deviations by which their number must be above what the limit expects: a run of many epochs sees ten
thousands of windows, and by chance one of them holds twice its share."""


class BadClips:
    """Counts the clips of all ranks that could not be decoded, and ends a run that has too many of them.

    Args:
        limit: share of the last `WINDOW` clips that may be bad; it is passed where chance does not explain more.
        seen: clips before those that it is told of, of a run that goes on; few enough of them were bad.
    """

    def __init__(self, limit: float, seen: int = 0) -> None:
        self._limit = limit
        self._bad, self._clips = 0, min(seen, WINDOW)
        self._steps: deque[tuple[int, int]] = deque([(0, 1)] * self._clips)

    def add(self, bad: int, clips: int) -> None:
        """Take one step of `clips` clips, of which `bad` had to be replaced.

        Raises:
            RuntimeError: too many were bad.
        """
        self._steps.append((bad, clips))
        self._bad += bad
        self._clips += clips
        while self._clips - self._steps[0][1] >= WINDOW:
            old_bad, old_clips = self._steps.popleft()
            self._bad -= old_bad
            self._clips -= old_clips
        expected = self._limit * self._clips
        if bad and self._bad >= LEAST and self._bad > expected + DEVIATIONS * math.sqrt(expected):
            raise RuntimeError(
                f"{self._bad} of the last {self._clips} clips cannot be decoded, more than loader.max_bad="
                f"{self._limit:g} allows; each was named when it was replaced: run `rev2net verify` on the data set"
            )
