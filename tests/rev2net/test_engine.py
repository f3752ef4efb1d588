"""What the engine and the process group need to know of the machine."""

from __future__ import annotations

import pytest

from rev2net.distributed import fair_threads
from rev2net.engine import conv3d_warning


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([("n1", {0, 1, 2, 3}), ("n1", {0, 1, 2, 3})], [2, 2]),  # all ranks see the whole machine
        ([("n1", {0, 1, 2, 3}), ("n1", {4, 5, 6, 7})], [4, 4]),  # each is bound to its own cores
        ([("n1", {0, 1}), ("n2", {0, 1})], [2, 2]),  # cores of two machines have the same numbers
        ([("n1", set(range(8)))] * 3, [2, 2, 2]),
        ([("n1", set(range(3)))] * 3, [1, 1, 1]),
        ([("n1", {0})] * 4, [1, 1, 1, 1]),
        ([("n1", {0, 1, 2, 3}), ("n1", {2, 3, 4, 5})], [3, 3]),
    ],
)
def test_a_core_is_shared_by_those_who_may_use_it(cores: list[tuple[str, set[int]]], threads: list[int]) -> None:
    assert [fair_threads(rank, cores) for rank in range(len(cores))] == threads


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "expected"),
    [
        ("2.8.0+cu128", 91002, "wrong results"),
        ("2.8.0+cu128", 90800, "wrong results"),
        ("2.8.0+cu126", 90501, None),
        ("2.9.1+cu128", 91002, "memory"),
        ("2.9.1+cu128", 91500, None),
        ("2.14.1", 91500, None),
        ("2.14.1+cpu", None, None),
    ],
)
def test_known_bad_convolutions(torch_version: str, cudnn: int | None, expected: str | None) -> None:
    warning = conv3d_warning(torch_version, cudnn)
    assert (warning is None) if expected is None else (warning is not None and expected in warning)
