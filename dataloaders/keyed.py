"""Counter-based randomness: every draw is a pure function of integers, on any machine and with any numpy.

The mixer is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a draw is for, so that draws for different things never share a key."""

    SHARD_ORDER = 1
    BLOCK_ORDER = 2
    CLIP_PLAN = 3
    REPLACEMENT = 4


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def hash64(*key: int) -> int:
    """Hash integers to 64 bits; the order of the integers matters."""
    state = 0
    for part in key:
        state = _mix(state ^ (part & _MASK))
    return state


def permutation(size: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size), int64 [size], drawn by `key`: element i is sorted by hash64(*key, i)."""
    values = np.arange(size, dtype=np.uint64) ^ np.uint64(hash64(*key))
    values += np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    # The mixer is one to one, so there are no ties and any sorting algorithm gives the same.
    return np.argsort(values ^ (values >> np.uint64(31)))


class Draws:
    """A sequence of random numbers that `key` alone decides; the n-th draw is always the same."""

    def __init__(self, *key: int) -> None:
        self._state = hash64(*key)
        self._count = 0

    def _next(self) -> int:
        self._count += 1
        return _mix(self._state ^ self._count)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * ((self._next() >> 11) * 2.0**-53)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return (self._next() * bound) >> 64
