"""The global sample order: which sample stands at which position, for ever, on any number of ranks and workers.

An epoch is one sequence: the shards in an order drawn by (seed, epoch), and inside blocks of that sequence the
samples permuted. The sequence is cut into S contiguous slices whose sizes differ by at most one, the larger first.
With N samples, position p lies in epoch p // N, and with i = p mod N it takes sample i // S of slice i mod S. So a
rank that serves fixed slots of every batch reads its slices front to back, which disks and caches like, while a batch
holds samples from S places of the data set.

Nothing here is as long as the data set: the state is O(shards) for two epochs plus some blocks' permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dataloaders.errors import UserError
from dataloaders.keyed import Purpose, permutation

_CACHED_BLOCKS = 1024
"""Of 4096 entries of 2 bytes each; drawing one again takes 0.3 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a position's sample lies.

    Attributes:
        shard: index into the split's shards as the manifest lists them.
        index_in_shard: among the split's samples in it.
        sample: index in the unshuffled data set, the same in every epoch.
    """

    epoch: int
    shard: int
    index_in_shard: int
    sample: int


class GlobalOrder:
    """The order that the module describes; a position is found in O(log shards).

    Args:
        shard_sizes: samples of each shard.
        slices: S; the global batch unless there is a reason for another value.
        block: samples that are permuted among each other.
        shuffle: False gives the shards and samples as they lie (the slices remain).

    Raises:
        UserError: there is no sample.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int, slices: int, block: int = 4096, shuffle: bool = True
    ) -> None:
        assert slices >= 1 and 1 <= block <= 2**16
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self._sizes.sum())
        if self.num_samples == 0:
            raise UserError("the split holds no sample; prepare it again or choose another split")
        self._first_sample = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._slices = slices
        self._block = block
        self._shuffle = shuffle
        self._epoch_shards = lru_cache(maxsize=2)(self._draw_shards)
        self._block_order = lru_cache(maxsize=_CACHED_BLOCKS)(self._draw_block)

    def locate(self, position: int) -> Location:
        """The sample at a global position; positions go on over the end of an epoch without a gap."""
        epoch, i = divmod(position, self.num_samples)
        shards, ends = self._epoch_shards(epoch)
        place = self._shuffled_place(epoch, self._place(i))
        turn = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[turn])
        index = place - int(ends[turn] - self._sizes[shard])
        sample = int(self._first_sample[shard]) + index
        return Location(epoch=epoch, shard=shard, index_in_shard=index, sample=sample)

    def _place(self, i: int) -> int:
        """Place in the epoch's sequence of the i-th sample served: sample i // S of slice i mod S."""
        size, larger = divmod(self.num_samples, self._slices)
        row, slot = divmod(i, self._slices)
        return slot * size + min(slot, larger) + row

    def _shuffled_place(self, epoch: int, place: int) -> int:
        if not self._shuffle:
            return place
        block, inside = divmod(place, self._block)
        return block * self._block + int(self._block_order(epoch, block)[inside])

    def _draw_shards(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The epoch's shards in order, and where each ends in the sequence."""
        count = len(self._sizes)
        if self._shuffle:
            shards = permutation(count, Purpose.SHARD_ORDER, self._seed, epoch)
        else:
            shards = np.arange(count, dtype=np.int64)
        return shards, np.cumsum(self._sizes[shards])

    def _draw_block(self, epoch: int, block: int) -> npt.NDArray[np.uint16]:
        size = min(self._block, self.num_samples - block * self._block)
        return permutation(size, Purpose.BLOCK_ORDER, self._seed, epoch, block).astype(np.uint16)
