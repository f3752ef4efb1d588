"""Bytes of optimizer state on each rank, ZeRO stages 0-3 on 1, 2 and 4 ranks, beside the theory; cost of a checkpoint.

    python benchmarks/zero.py --write benchmarks/zero.md      (three minutes on 2 cores)

The network is Rev2Net at full width with 400 classes; AdamW keeps two float32 numbers for each parameter. Stage 0 holds
all of them on every rank, stages 1 to 3 a W-th part. DeepSpeed rounds partitions up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from machine import cpu_facts, page_parser, publish

REPEATS = 5
RANKS = (1, 2, 4)
STAGES = (0, 1, 2, 3)


def seconds(work: Callable[[], object]) -> float:
    """Median over `REPEATS`."""
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return median(taken)


def worker(width: float) -> None:
    """On every rank of a launcher: build each stage's engine and print, on rank 0, what the ranks hold."""
    from rev2net import checkpoint, snapshot
    from rev2net.config import config_from_tree
    from rev2net.distributed import join, read_ranks
    from rev2net.engine import build_engine
    from rev2net.models.build import build_network

    ranks = read_ranks()
    join(ranks, 1)
    for stage in STAGES:
        config = config_from_tree(
            {
                "output": "unused",
                "data": {"path": "unused", "frames": 8, "size": 64},
                "model": {"width": width},
                "optim": {"name": "adamw"},
                "train": {"zero_stage": stage, "precision": "fp32", "global_batch": 4, "micro_batch": 1},
            }
        )
        network = build_network(config, 400)
        parameters = sum(p.numel() for p in network.parameters())
        engine = build_engine(config, ranks, network)
        row = {"stage": stage, "parameters": parameters, "bytes": ranks.gather(engine.optimizer_bytes)}
        row["copy"] = seconds(lambda: snapshot.take(engine))  # noqa: B023 - called at once
        taken = snapshot.take(engine)
        if taken is not None:
            state = checkpoint.RunState(
                step=1, run_id=None, classes=(), world_size=1, config={}, preparation={}, updates=1
            )
            with tempfile.TemporaryDirectory() as folder:
                row["write"] = seconds(lambda: checkpoint.write(Path(folder), taken, state))  # noqa: B023
                row["size"] = sum(file.stat().st_size for file in checkpoint.find(folder).iterdir())
            print("held", json.dumps(row), flush=True)
        ranks.barrier()


def measure(ranks: int, width: float = 1.0) -> list[dict[str, Any]]:
    """What `worker` finds on so many ranks: a row per stage, with the theory's bytes on a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launcher, __file__, "--worker", str(width)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    rows = [json.loads(line.split(maxsplit=1)[1]) for line in done.stdout.splitlines() if line.startswith("held ")]
    if done.returncode or len(rows) != len(STAGES):
        sys.exit(done.stderr)
    for row in rows:
        row |= {"ranks": ranks, "theory": 8 * row["parameters"] / (ranks if row["stage"] else 1)}
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown page."""
    worst = max(max(row["bytes"]) / row["theory"] - 1 for row in rows)
    lines = [
        "# Optimizer state under ZeRO, and what a checkpoint costs",
        "",
        f"`python benchmarks/zero.py --write benchmarks/zero.md`, {date.today()}, {cpu_facts()[0]}.",
        "",
        f"AdamW, Rev2Net with {rows[0]['parameters'] / 1e6:.2f} M parameters; megabytes of its two float32 numbers a",
        "parameter on the rank that holds most, beside 8 bytes x parameters / ranks (stage 0: not divided).",
        "",
        "| ranks | stage | MB on a rank | theory | more than it |",
        "|---|---|---|---|---|",
        *(
            f"| {row['ranks']} | {row['stage']} | {max(row['bytes']) / 1e6:.3f} | {row['theory'] / 1e6:.3f} | "
            f"{max(row['bytes']) / row['theory'] - 1:.4%} |"
            for row in rows
        ),
        "",
        f"At most {worst:.4%} more than the theory: partitions are rounded up to whole numbers of elements.",
        "",
        f"A checkpoint ({rows[0]['size'] / 1e6:.0f} MB on one rank) is copied to memory, for which the training stands",
        f"still, and written by a thread of rank 0 while it goes on; medians of {REPEATS}. Gathering the parts costs",
        "ranks that share 2 cores more than it costs GPUs with NCCL.",
        "",
        "| ranks | stage | copy, s | write, hash and sync, s | share of the time that stops the training |",
        "|---|---|---|---|---|",
        *(
            f"| {row['ranks']} | {row['stage']} | {row['copy']:.3f} | {row['write']:.3f} | "
            f"{row['copy'] / (row['copy'] + row['write']):.0%} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the module."""
    parser = page_parser(__doc__)
    parser.add_argument("--worker", type=float, metavar="WIDTH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker)
        return 0
    text = page([row for ranks in RANKS for row in measure(ranks)])
    publish(text, args.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
