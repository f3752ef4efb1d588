"""The sample order at scale: 10^8 samples in 10^4 shards on 512 ranks.

    python benchmarks/order.py --write benchmarks/order.md      (about three minutes)

A manifest of 10^4 shards is written, and some of the 512 ranks are run one after the other, each in a process of its
own, which does what a loader does before it decodes: opens the data set, makes the order, and locates the positions of
its slots, first at a start, then after many random jumps. A rank's time is from opening the manifest on; importing
Python's and torch's modules is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median

from machine import cpu_facts, page_parser, publish

from dataloaders.loader import FETCH_STEPS
from dataloaders.order import GlobalOrder
from dataloaders.shards import FORMAT, DataSet, shard_name, write_manifest

SAMPLES, SHARDS, RANKS, SLOTS = 10**8, 10**4, 512, 8
BATCH = RANKS * SLOTS
EPOCHS = 100
STEPS = 3000
"""One after the other, of a rank that goes on from a random step."""
COLD, WARM = 4000, 40_000
CHOSEN = (0, 1, 255, 510, 511)


def shard_sizes() -> list[int]:
    """Unequal shards of 10^8 samples in all."""
    rng = random.Random(0)
    sizes = [10_000 + rng.randrange(-500, 501) for _ in range(SHARDS)]
    sizes[-1] += SAMPLES - sum(sizes)
    return sizes


def write_data(folder: Path) -> None:
    """A manifest like `rev2net prepare` writes; the shards themselves are not needed."""
    shards = [
        {"file": shard_name("train", i), "samples": size, "bytes": 10**9, "sha256": f"{i:064x}"}
        for i, size in enumerate(shard_sizes())
    ]
    write_manifest(
        folder,
        {
            "format": FORMAT,
            "classes": [f"class {i}" for i in range(400)],
            "splits": {"train": {"samples": SAMPLES, "shards": shards}},
            "video": {"codec": "h264", "fps": 25.0, "keyframe_interval": 12},
            "flow": None,
        },
    )


def resident() -> float:
    """Memory of this process that is in use, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def times(locate: Callable[[int], object], positions: Sequence[int]) -> tuple[float, float, float]:
    """Median, 99.9th percentile and worst time of locating one position, in milliseconds."""
    taken = []
    for position in positions:
        start = time.perf_counter()
        locate(position)
        taken.append((time.perf_counter() - start) * 1e3)
    taken.sort()
    return median(taken), taken[int(0.999 * len(taken))], taken[-1]


def run_rank(folder: Path, rank: int) -> dict[str, float | list[float]]:
    """What one process needs."""
    before = resident()
    start = time.perf_counter()
    data = DataSet.open(folder)
    order = GlobalOrder([shard.samples for shard in data.shards("train")], seed=0, slices=BATCH)
    first = rank * SLOTS
    for slot in range(first, first + SLOTS):
        order.locate(slot)
    begun = time.perf_counter() - start
    opened = resident()
    rng = random.Random(rank)
    # Cold: an epoch that was not seen, whose shards have to be permuted, and a block of it.
    cold_epoch = times(order.locate, [rng.randrange(EPOCHS) * SAMPLES + rng.randrange(SAMPLES) for _ in range(COLD)])
    # Cold: a block that was not seen, in an epoch that was.
    cold_block = times(order.locate, [rng.randrange(SAMPLES) for _ in range(COLD)])
    # Warm: step after step of this rank, with what is fetched ahead for a remote data set.
    step = rng.randrange(EPOCHS * SAMPLES // BATCH)
    near = [slot + (step + ahead) * BATCH for ahead in range(STEPS) for slot in range(first, first + SLOTS)]
    for position in near[: FETCH_STEPS * SLOTS]:
        order.locate(position)
    warm = times(order.locate, (near * 2)[:WARM])
    return {
        "start": begun,
        "opened": opened - before,
        "grown": resident() - before,
        "epoch": list(cold_epoch),
        "block": list(cold_block),
        "warm": list(warm),
    }


def page(found: dict[int, dict[str, float | list[float]]]) -> str:
    """The Markdown page."""

    def worst(name: str, column: int) -> float:
        return max(values[name][column] for values in found.values())  # type: ignore[index]

    rows = []
    for rank, values in found.items():
        cells = [f"{values['start']:.2f}", f"{values['opened']:.0f}", f"{values['grown']:.0f}"]
        for name in ("epoch", "block", "warm"):
            cells += [" / ".join(f"{value:.3f}" for value in values[name])]  # type: ignore[union-attr]
        rows.append(f"| {rank} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "# The order at scale",
            "",
            f"`python benchmarks/order.py --write benchmarks/order.md`, {date.today()}, {cpu_facts()[0]};",
            f"{SAMPLES:.0e} samples in {SHARDS:,} shards, {RANKS} ranks of {SLOTS} slots (global batch and slices",
            f"{BATCH:,}), each measured rank in a fresh process.",
            "",
            "| | wanted | measured, worst rank |",
            "|---|---|---|",
            f"| opening `dataset.json` to the first located batch | < 5 s | "
            f"{max(values['start'] for values in found.values()):.2f} s |",
            f"| memory of the process, grown since before opening | < 64 MB | "
            f"{max(values['grown'] for values in found.values()):.0f} MB |",
            f"| a position in a block not seen before, median | < 1 ms | {worst('block', 0):.3f} ms |",
            f"| a position in an epoch and block not seen before, median | < 1 ms | {worst('epoch', 0):.3f} ms |",
            f"| a position of the next steps, median | < 1 ms | {worst('warm', 0):.3f} ms |",
            "",
            "Times of locating one position in milliseconds, median / 99.9th percentile / worst:",
            f"`epoch`, {COLD:,} random positions of {EPOCHS} epochs, whose shards are permuted anew nearly each time;",
            f"`block`, {COLD:,} random positions of one epoch, whose block of 4,096 is permuted anew;",
            f"`next`, {WARM:,} in the order of the rank's steps. The memory is that after all of them. The worst",
            "hold what else the machine did.",
            "",
            "| rank | start, s | opened, MB | in the end, MB | epoch, ms | block, ms | next, ms |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> int:
    """See the module."""
    parser = page_parser(__doc__)
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(run_rank(Path(args.rank[0]), int(args.rank[1]))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        found = {}
        for rank in CHOSEN:
            command = [sys.executable, __file__, "--rank", folder, str(rank)]
            found[rank] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    text = page(found)
    publish(text, args.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
