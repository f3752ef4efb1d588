"""ZeRO does what it says: each rank holds its part of the optimizer's state."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import BIN, ROOT, run

CONSTANT = 64 * 1024
"""Bytes on a rank that rounding may add: DeepSpeed's partitions are whole and aligned."""


def test_optimizer_state_is_divided_by_the_ranks_from_stage_1_on() -> None:
    script = Path(ROOT, "benchmarks", "zero.py")
    done = run(str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", str(script), "--worker", "0.25")
    rows = [json.loads(line.removeprefix("held ")) for line in done.stdout.splitlines() if line.startswith("held ")]
    assert [row["stage"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        theory = 8 * row["parameters"] / (2 if row["stage"] else 1)  # two float32 numbers a parameter
        assert len(row["bytes"]) == 2
        assert all(0.95 * theory <= held <= 1.05 * theory + CONSTANT for held in row["bytes"]), row
