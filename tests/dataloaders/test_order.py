from __future__ import annotations

import itertools
import tracemalloc

import pytest

from dataloaders.errors import UserError
from dataloaders.keyed import Draws, hash64, permutation
from dataloaders.order import GlobalOrder

PINNED = [0, 9, 10, 4, 5, 6, 8, 1, 11, 7, 2, 3, 11, 7, 9, 2]

SHARDS = [(1,), (5, 3, 4), (7, 0, 1, 12, 9), tuple([10] * 13)]


def test_hash_is_splitmix64() -> None:
    # First output of the published generator with seed 0.
    assert hash64(0) == 0xE220A8397B1DCDAF
    assert hash64(1, 2) != hash64(2, 1)


def test_draws_are_uniform_and_repeatable() -> None:
    values = [Draws(7, i).uniform() for i in range(4000)]
    assert values[3] == Draws(7, 3).uniform()
    assert all(0 <= value < 1 for value in values)
    assert abs(sum(values) / 4000 - 0.5) < 0.02
    draws = Draws(1)
    counts = [0] * 5
    for _ in range(5000):
        counts[draws.below(5)] += 1
    assert min(counts) > 900
    assert sorted(permutation(100, 3)) == list(range(100))


@pytest.mark.parametrize("sizes", SHARDS)
@pytest.mark.parametrize("slices", [1, 4, 16, 64])
@pytest.mark.parametrize("block", [1, 8, 4096])
def test_p2_an_epoch_visits_every_sample_once(sizes: tuple[int, ...], slices: int, block: int) -> None:
    order = GlobalOrder(sizes, seed=3, slices=slices, block=block)
    total = sum(sizes)
    for epoch in (0, 1, 5):
        places = [order.locate(epoch * total + i) for i in range(total)]
        assert {place.epoch for place in places} == {epoch}
        assert sorted(place.sample for place in places) == list(range(total))
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        for place in places:
            assert 0 <= place.index_in_shard < sizes[place.shard]
            assert place.sample == starts[place.shard] + place.index_in_shard


def test_p1_the_order_never_changes() -> None:
    """A resumed run of an older version must go on where it was: these numbers are fixed for ever."""
    order = GlobalOrder((5, 3, 4), seed=42, slices=4, block=8)
    assert [order.locate(p).sample for p in range(16)] == PINNED


def test_the_order_changes_with_seed_and_epoch() -> None:
    def samples(seed: int, epoch: int) -> list[int]:
        order = GlobalOrder([10] * 10, seed=seed, slices=4)
        return [order.locate(epoch * 100 + i).sample for i in range(100)]

    assert len({tuple(samples(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_slot_reads_its_slice_front_to_back() -> None:
    """With blocks of one sample, the shards of a slot come one after the other, each once."""
    order = GlobalOrder([50] * 20, seed=0, slices=8, block=1)
    for slot in range(8):
        shards = [order.locate(row * 8 + slot).shard for row in range(125)]
        assert len([shard for shard, _ in itertools.groupby(shards)]) == len(set(shards))


def test_without_shuffle_and_slices_samples_come_as_they_lie() -> None:
    order = GlobalOrder((5, 0, 4), seed=0, slices=1, shuffle=False)
    assert [order.locate(p).sample for p in range(9)] == list(range(9))


def test_no_sample_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no sample"):
        GlobalOrder((0, 0), seed=0, slices=1)


def test_a_hundred_million_samples_fit_into_little_memory() -> None:
    tracemalloc.start()
    order = GlobalOrder([10_000] * 10_000, seed=0, slices=1024)
    for step in range(3):
        for slot in range(1024):
            order.locate(step * 7_000_000 * 4 + slot)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6
