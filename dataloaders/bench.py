"""How fast each backend is beside its own decoder: `rev2net bench loader DATA`.

The ceiling is the decoder alone on the clips that the loader reads: the same videos and frames, found and decoded with
as many threads, and nothing after it (no colour conversion with PyAV, no crop and resize with DALI, no batch). Where
the time goes is measured on batches that are made one after the other, without the overlap of the loader.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from dataloaders.batch import ClipRequest
from dataloaders.errors import UserError
from dataloaders.lanes import choose_backend
from dataloaders.loader import TrainLoader
from dataloaders.plan import Augment, ClipShape
from dataloaders.pyav_backend import decode_only
from dataloaders.shards import DataSet
from dataloaders.workers import cores

Name = Literal["dali", "pyav"]
_CEILING_BATCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSpeed:
    """One row of the table; rates are clips per second, None where the backend cannot decode the data set here.

    Attributes:
        shares: part of a batch's time that each stage takes.
    """

    backend: Name
    loader: float | None
    ceiling: float | None
    note: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)


def bench_loader(
    dataset_path: str | Path,
    *,
    split: str = "train",
    shape: ClipShape,
    batch: int = 8,
    workers: int = 2,
    pipelines_per_gpu: int = 1,
    with_flow: bool = False,
    device: torch.device | str = "cpu",
    seconds: float = 10.0,
) -> list[LoaderSpeed]:
    """Measure the training loader with each backend, each for about two and a half times `seconds`.

    Raises:
        UserError: the data set, split or flow is not there.
    """
    dataset = DataSet.open(dataset_path)
    device = torch.device(device)
    rows = []
    for name in get_args(Name):
        try:
            choose_backend(name, dataset.codec, device)
        except UserError as error:
            rows.append(LoaderSpeed(backend=name, loader=None, ceiling=None, note=str(error)))
            continue
        loader = TrainLoader(
            dataset,
            split,
            shape=shape,
            augment=Augment(),
            seed=0,
            global_batch=batch,
            micro_batch=batch,
            backend=name,
            workers=workers,
            pipelines_per_gpu=pipelines_per_gpu,
            device=device,
            with_flow=with_flow,
        )
        with loader:
            chunks = [loader.requests(range(k * batch, (k + 1) * batch)) for k in range(_CEILING_BATCHES)]
            ceiling = _ceiling(name, chunks, workers, device, with_flow, seconds)
            shares = _shares(loader, batch, ceiling, seconds / 2)
            rate = _rate_of_loader(loader, seconds)
            rows.append(LoaderSpeed(backend=name, loader=rate, ceiling=ceiling, shares=shares))
    return rows


def table(rows: Sequence[LoaderSpeed]) -> str:
    """The rows as text."""
    lines = [f"{'backend':<8} {'loader':>10} {'decoder':>10} {'share':>6}   (clips/s)"]
    for row in rows:
        if row.loader is None or row.ceiling is None:
            lines.append(f"{row.backend:<8} {'-':>10} {'-':>10} {'-':>6}   {row.note}")
        else:
            share = f"{row.loader / row.ceiling:.0%}"
            parts = ", ".join(f"{stage} {part:.0%}" for stage, part in row.shares.items())
            lines.append(f"{row.backend:<8} {row.loader:>10.1f} {row.ceiling:>10.1f} {share:>6}   {parts}")
    return "\n".join(lines)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net bench loader`."""
    parser.description = "Clips per second of each backend beside its own decoder."
    parser.epilog = "example: rev2net bench loader data/ucf101 --frames 32 --size 224 --workers 8 --device cuda"
    parser.add_argument("data", help="a prepared data set: folder or URL")
    parser.add_argument("--split", default="train")
    parser.add_argument("--frames", type=int, default=32, help="frames of a clip (default: 32)")
    parser.add_argument("--segments", type=int, default=0, help="parts of the video that the frames are spread over")
    parser.add_argument("--size", type=int, default=224, help="height and width of a clip (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="clips in a micro-batch (default: 8)")
    parser.add_argument("--workers", type=int, default=len(cores()), help="threads (default: all cores)")
    parser.add_argument("--pipelines", type=int, default=1, help="DALI pipelines (default: 1)")
    parser.add_argument("--flow", action="store_true", help="also decode the flow")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each measurement (default: 10)")


def run_bench(arguments: argparse.Namespace) -> int:
    """Print the table; exit status 0."""
    for name in ("frames", "size", "batch", "workers", "pipelines"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} is not possible: give 1 or more")
    if arguments.segments and arguments.frames % arguments.segments:
        raise UserError(
            f"--frames {arguments.frames} cannot be shared out to --segments {arguments.segments}: give a multiple"
        )
    rows = bench_loader(
        arguments.data,
        split=arguments.split,
        shape=ClipShape(
            frames=arguments.frames, height=arguments.size, width=arguments.size, segments=arguments.segments
        ),
        batch=arguments.batch,
        workers=arguments.workers,
        pipelines_per_gpu=arguments.pipelines,
        with_flow=arguments.flow,
        device=arguments.device,
        seconds=arguments.seconds,
    )
    print(table(rows))
    return 0


def _shares(loader: TrainLoader, batch: int, ceiling: float, seconds: float) -> dict[str, float]:
    """Where the time of batches goes; what the backend takes beyond the decoder alone is its other work."""
    loader.stage_seconds(range(batch))  # the first one opens shards and starts threads
    sums = [0.0, 0.0, 0.0]
    batches = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        batches += 1
        taken = loader.stage_seconds(range(batches * batch, (batches + 1) * batch))
        sums = [old + new for old, new in zip(sums, taken, strict=True)]
    read, backend, finish = sums
    decoder = min(backend, batches * batch / ceiling)
    total = read + backend + finish
    return {
        "read": read / total,
        "decode": decoder / total,
        "convert, cut and resize": (backend - decoder) / total,
        "finish": finish / total,
    }


def _rate_of_loader(loader: TrainLoader, seconds: float) -> float:
    # The batches that were made before the clock started would be counted for nothing.
    for _ in range(3):
        next(loader)
    return _rate(lambda: len(next(loader)), loader.synchronize, seconds)


def _rate(step: Callable[[], int], finish: Callable[[], None], seconds: float) -> float:
    """Clips per second; `step` gives the number of clips it made."""
    finish()
    clips = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        clips += step()
    finish()
    return clips / (time.perf_counter() - begin)


def _ceiling(
    name: Name,
    chunks: Sequence[Sequence[ClipRequest]],
    workers: int,
    device: torch.device,
    with_flow: bool,
    seconds: float,
) -> float:
    if name == "pyav":
        requests = [request for chunk in chunks for request in chunk]
        with ThreadPoolExecutor(max(1, workers)) as pool:

            def decode_all() -> int:
                return len(list(pool.map(decode_only, requests)))

            return _rate(decode_all, lambda: None, seconds)
    from dataloaders.dali_backend import DecoderOnly

    decoder = DecoderOnly(device=device, batch=len(chunks[0]), threads=workers, with_flow=with_flow)

    def decode_chunks() -> int:
        return sum(decoder.decode(chunk) for chunk in chunks)

    decode_chunks()
    return _rate(decode_chunks, lambda: None, seconds)
