"""Our TV-L1 against OpenCV's on pairs of real frames: agreement, energy, pairs per second.

    python benchmarks/tvl1.py --write benchmarks/tvl1.md      (needs ../shared/videos; about ten minutes on 2 cores)

The pairs: all files of ucf101, hmdb51 and kinetics400 and every 30th file of skateboard, in order of their names, each
at a third and at two thirds of its length; grey frames as FFmpeg gives them, scaled to 256 pixels on the short side
where they are larger.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import av
import cv2
import numpy as np
import numpy.typing as npt
from machine import cpu_facts, page_parser, publish

from dataloaders.flow import kernels, tvl1

Floats = npt.NDArray[np.float32]
VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos"
EVERY = {"ucf101": 1, "hmdb51": 1, "kinetics400": 1, "skateboard": 30}
THREADS = 2
REPEATS = 5
NOISE = 0.0001
"""Grey levels of noise under which OpenCV's own answer is looked at."""
OPERATIONS, BYTES = 54, 64
"""Of one inner iteration, a pixel: counted in `_primal_row` (26) and twice `_dual_row` (14); float32 in and out."""
STABLE = 0.02
"""Pixels: where OpenCV moves less than this on average, it agrees with itself."""


@dataclass(frozen=True)
class Pair:
    """Two consecutive grey frames [2, H, W] of a file."""

    name: str
    frame: int
    frames: npt.NDArray[np.uint8]


def pairs_of(path: Path) -> list[Pair]:
    """The pairs at 1/3 and 2/3 of a file."""
    with av.open(str(path), metadata_errors="ignore") as container:
        pictures = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    short = min(pictures[0].shape)
    if short > 256:
        size = tuple(round(side * 256 / short) for side in pictures[0].shape[::-1])
        pictures = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures]
    name = f"{path.parent.parent.name}/{path.parent.name}/{path.name}"
    at = [len(pictures) * third // 3 for third in (1, 2)]
    return [Pair(name, i, np.stack(pictures[i : i + 2])) for i in at if i + 1 < len(pictures)]


def chosen() -> list[Pair]:
    """All pairs of the rule above."""
    files: list[Path] = []
    for folder, every in EVERY.items():
        found = sorted(f for f in (VIDEOS / folder).rglob("*") if f.suffix in (".avi", ".mp4"))
        files += found[::every]
    return [pair for file in files for pair in pairs_of(file)]


def opencv(frames: npt.NDArray[Any]) -> Floats:
    """OpenCV's flow of a pair, [2, H, W]."""
    flow = cv2.optflow.DualTVL1OpticalFlow_create().calc(frames[0], frames[1], None)
    return np.ascontiguousarray(flow.transpose(2, 0, 1))


def ours(frames: npt.NDArray[Any]) -> Floats:
    """Our flow of a pair, on one thread."""
    return tvl1(frames, threads=1)[0]


def energy(frames: npt.NDArray[np.uint8], flow: Floats, attachment: float = 0.15) -> float:
    """Total variation of u and v plus lambda times the absolute brightness residual, per pixel."""
    first, second = frames.astype(np.float32)
    height, width = first.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    warped = cv2.remap(second, x + flow[0], y + flow[1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
    variation = 0.0
    for component in flow.astype(np.float64):
        dx = np.diff(component, axis=1, append=component[:, -1:])
        dy = np.diff(component, axis=0, append=component[-1:])
        variation += float(np.hypot(dx, dy).sum())
    return (variation + attachment * float(np.abs(warped - first).sum(dtype=np.float64))) / first.size


def distance(a: Floats, b: Floats) -> tuple[float, float]:
    """Mean and 99th percentile of the end-point difference."""
    error = np.hypot(a[0] - b[0], a[1] - b[1])
    return float(error.mean()), float(np.percentile(error, 99))


def seconds(work: Callable[[], object]) -> float:
    """Median over `REPEATS`."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def in_threads(flow: Callable[[npt.NDArray[Any]], Floats], pairs: Sequence[Pair], threads: int) -> None:
    """All pairs, `threads` at a time."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(flow, [pair.frames for pair in pairs]))


def speeds(pairs: Sequence[Pair]) -> dict[str, float]:
    """Pairs per second of each way, all pairs, in one run."""
    found = {}
    for threads in (1, THREADS):
        cv2.setNumThreads(threads)
        found[f"opencv, its own {threads} thread(s)"] = len(pairs) / seconds(lambda: in_threads(opencv, pairs, 1))
        if threads > 1:
            cv2.setNumThreads(1)
            found[f"opencv, {threads} pairs at a time"] = len(pairs) / seconds(lambda: in_threads(opencv, pairs, 2))
        found[f"ours, {threads} thread(s)"] = len(pairs) / seconds(lambda n=threads: in_threads(ours, pairs, n))
    return found


def row(pair: Pair) -> dict[str, Any]:
    """Agreement and energies of one pair."""
    grey = pair.frames.astype(np.float32) / np.float32(255)  # OpenCV multiplies float frames with 255
    noise = np.random.default_rng(0).normal(0, NOISE / 255, grey.shape).astype(np.float32)
    reference, found = opencv(pair.frames), ours(pair.frames)
    own, _ = distance(opencv(grey), opencv(grey + noise))
    apart, tail = distance(found, reference)
    theirs, mine = energy(pair.frames, reference), energy(pair.frames, found)
    return {
        "pair": f"{pair.name} @{pair.frame}",
        "size": f"{pair.frames.shape[2]}x{pair.frames.shape[1]}",
        "own": own,
        "mean": apart,
        "p99": tail,
        "energy": mine / theirs,
    }


def timed_refine(taken: dict[str, float], counted: dict[str, int]) -> Callable[..., None]:
    """`kernels.refine` with its loops in Python, so that each kernel can be timed; it gives the same flow."""

    def refine(first: Floats, second: Floats, flow: Floats, settings: Any, counts: Any) -> None:
        def run(name: str, *args: Any) -> Any:
            start = time.perf_counter()
            found = getattr(kernels, name)(*args)
            taken[name] = taken.get(name, 0.0) + time.perf_counter() - start
            counted[name] = counted.get(name, 0) + first.size
            return found

        (bound, theta, step), (height, width) = settings[:3], first.shape
        enough = settings[3] * settings[3] * first.size
        data, px = np.empty((4, height, width), np.float32), np.zeros((2, height, width + 1), np.float32)
        py, smooth = np.zeros((2, height + 1, width), np.float32), np.empty_like(first)
        columns, squares = np.empty((5, width + 4), np.float32), np.empty(width, np.float32)
        for _ in range(counts[0]):
            run("linearise", first, second, flow, data)
            change = 1e30
            for _ in range(counts[1]):
                if change <= enough:
                    break
                for component in range(2):
                    run("median5", flow[component], columns, smooth)
                    flow[component] = smooth
                for _ in range(counts[2]):
                    if change <= enough:
                        break
                    change = run("iterate", data, flow, px, py, squares, bound, theta, step)

    return refine


def iteration_speed(height: int, width: int) -> float:
    """Nanoseconds a pixel of one inner iteration over a picture of this size, whose arrays stay where they fit."""
    rng = np.random.default_rng(0)
    data, flow = rng.normal(size=(4, height, width)).astype(np.float32), np.zeros((2, height, width), np.float32)
    px, py = np.zeros((2, height, width + 1), np.float32), np.zeros((2, height + 1, width), np.float32)
    squares = np.empty(width, np.float32)
    repeats = max(1, 20_000_000 // (height * width))

    def work() -> None:
        for _ in range(repeats):
            kernels.iterate(data, flow, px, py, squares, 0.045, 0.3, 0.8)

    work()
    return seconds(work) / repeats / (height * width) * 1e9


def limits(pairs: Sequence[Pair]) -> list[str]:
    """Where the kernel's time goes, and what bounds its largest part."""
    taken: dict[str, float] = {}
    counted: dict[str, int] = {}
    start = time.perf_counter()
    with mock.patch.object(kernels, "refine", timed_refine(taken, counted)):
        timed = [ours(pair.frames) for pair in pairs]
    total = time.perf_counter() - start
    assert all(np.array_equal(flow, ours(pair.frames)) for flow, pair in zip(timed, pairs, strict=True))
    speed = {rows: iteration_speed(rows, 340) for rows in (4, 16, 64, 256)}
    slower = speed[256] / min(speed.values())
    return [
        "",
        "## What limits it",
        "",
        f"Kernels timed one by one on one thread, over {len(pairs)} of the pairs (the flow is the same, bit for bit):",
        "",
        "| kernel | share of the time | ns a pixel and call |",
        "|---|---|---|",
        *(
            f"| {name} | {value / total:.1%} | {value / counted[name] * 1e9:.2f} |"
            for name, value in sorted(taken.items(), key=lambda entry: -entry[1])
        ),
        "",
        f"One inner iteration (`iterate`) counts {OPERATIONS} float operations a pixel, two square roots and two",
        f"divisions among them, and touches {BYTES} bytes a pixel once (ten planes read, six of them written). Its",
        "speed on pictures 340 pixels wide, whose ten planes lie in a nearer cache the fewer rows there are:",
        "",
        "| rows | all planes, KB | ns a pixel | GFLOP/s | GB/s |",
        "|---|---|---|---|---|",
        *(
            f"| {rows} | {40 * 340 * rows / 1024:.0f} | {ns:.3f} | {OPERATIONS / ns:.0f} | {BYTES / ns:.0f} |"
            for rows, ns in speed.items()
        ),
        "",
        f"A whole picture costs {slower:.2f} times what the fastest of them costs a pixel: "
        + ("arithmetic, with its roots and divisions, bounds it." if slower < 1.3 else "memory bounds it."),
    ]


def page(rows: Sequence[dict[str, Any]], speed: dict[str, float], limiting: Sequence[str]) -> str:
    """The Markdown page."""
    stable = [r for r in rows if r["own"] < STABLE]
    others = [r for r in rows if r["own"] >= STABLE]
    single = speed["ours, 1 thread(s)"] / speed["opencv, its own 1 thread(s)"]
    best = max(v for k, v in speed.items() if k.startswith("opencv") and str(THREADS) in k)
    lines = [
        "# TV-L1 against OpenCV",
        "",
        f"`python benchmarks/tvl1.py --write benchmarks/tvl1.md`, {date.today()}, {cpu_facts()[0]},",
        f"OpenCV {cv2.__version__}; {len(rows)} pairs by the rule in the script; medians of {REPEATS} passes over all.",
        "",
        "| way | pairs/s |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in speed.items()),
        "",
        f"Ours to OpenCV: {single:.1f} on one thread, {speed[f'ours, {THREADS} thread(s)'] / best:.1f} on {THREADS},",
        "there against the better of OpenCV's two ways to use them.",
        "",
        f"On the {len(stable)} pairs where OpenCV agrees with itself (noise of {NOISE} grey level moves its mean by",
        f"less than {STABLE} pixel): mean end-point difference {mean(r['mean'] for r in stable):.4f} pixel, largest",
        f"mean {max(r['mean'] for r in stable):.4f}, largest 99th percentile {max(r['p99'] for r in stable):.3f}.",
    ]
    if others:
        lines += [
            f"On the other {len(others)}: difference at most {max(r['mean'] / r['own'] for r in others):.2f} times",
            f"OpenCV's own movement, energy at most {max(r['energy'] for r in others):.4f} times OpenCV's.",
        ]
    lines += [
        *limiting,
        "",
        "## Each pair",
        "",
        "| pair | size | OpenCV's own movement, px | difference, px | 99th percentile, px | energy, ours / OpenCV |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['pair']} | {r['size']} | {r['own']:.4f} | {r['mean']:.4f} | {r['p99']:.3f} | {r['energy']:.4f} |"
            for r in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the module."""
    parser = page_parser(__doc__)
    parser.add_argument("--pairs", type=int, help="only the first so many, to try it")
    args = parser.parse_args()
    if not VIDEOS.is_dir():
        sys.exit(f"{VIDEOS} is not there: the real clips are needed")
    pairs = list(itertools.islice(chosen(), args.pairs))
    ours(pairs[0].frames)  # compiles
    text = page([row(pair) for pair in pairs], speeds(pairs), limits(pairs[::5]))
    publish(text, args.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
