"""Is a data set on disk what its manifest says? The command `rev2net verify`."""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from dataloaders.batch import Backend, ClipRequest
from dataloaders.errors import DecodeError, UserError
from dataloaders.lanes import choose_backend
from dataloaders.plan import ClipPlan, ClipShape
from dataloaders.progress import Progress
from dataloaders.remote import DamagedShardError
from dataloaders.shards import (
    FLOW_EXTENSION,
    INFO_EXTENSION,
    RGB_EXTENSION,
    DataSet,
    SampleInfo,
    ShardInfo,
    file_sha256,
    index_path,
)
from dataloaders.video import StoredVideo, decode_luma, inspect_video

_NO_BOUND = 1e9
_WINDOW = 64
_SMALL = 32
"""Frames in one call of DALI, and the size that they are shrunk to: only whether they decode is of interest."""

Decoder = Callable[[Mapping[str, bytes], SampleInfo], Iterator[str]]
"""Decodes every frame of a sample's videos; yields what is wrong, raises DecodeError at a frame that cannot be."""


def verify(location: str | Path, deep: bool = False) -> list[str]:
    """Compare every shard and every sample with the manifest.

    Checked are sizes and hashes of the shards, the index against the tar, the number of samples, and of
    every sample its parts, label, picture sizes, frame count, codec, and that flow is tagged full range in
    its bitstream; and that no class is without a sample to learn from. Of a remote data set every shard is fetched,
    whatever a cache holds, and the index is the one that training makes of the tar.

    Args:
        location: folder or URL.
        deep: also decode every frame, with PyAV and, where training would take it here, with DALI.

    Returns:
        One sentence per problem; empty when all is well.

    Raises:
        UserError: there is no data set.
        RuntimeError: a remote one's server cannot be reached.
    """
    with _opened(location) as data:
        return _problems(data, deep)


@contextmanager
def _opened(location: str | Path) -> Iterator[DataSet]:
    """The data set, with a cache of its own for as long."""
    with tempfile.TemporaryDirectory(prefix="rev2net-verify-") as aside:
        yield DataSet.open(location, cache=aside, cache_gb=_NO_BOUND)


def _problems(data: DataSet, deep: bool) -> list[str]:
    shards = [(split, shard) for split in data.splits for shard in data.shards(split)]
    problems: list[str] = []
    labels: dict[str, set[int]] = {split: set() for split in data.splits}
    for split, entry in data.manifest["splits"].items():
        if entry["samples"] != data.num_samples(split):
            problems.append(
                f"split {split}: {entry['samples']} samples in all, {data.num_samples(split)} in its shards"
            )
    decoders = _decoders(data) if deep else []
    with Progress(len(shards), "shard") as progress:
        for split, shard in shards:
            problems += _shard_problems(data, shard, decoders, labels[split])
            if data.remote:
                shard.path.unlink(missing_ok=True)
                index_path(shard.path).unlink(missing_ok=True)
            progress.step()
    if problems:  # They may hide samples.
        return problems
    learned = labels["train"] if "train" in labels else set().union(*labels.values())
    where = "the split train" if "train" in labels else "any split"
    return [f"class {name} has no sample in {where}" for i, name in enumerate(data.classes) if i not in learned]


def _decoders(data: DataSet) -> list[Decoder]:
    """What tries every frame: PyAV, which says how many there are, and DALI where training would take it here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if choose_backend("auto", data.codec, device) == "pyav":
        return [_count_frames]
    from dataloaders.dali_backend import DALIBackend

    dali = DALIBackend(device=device, batch=1, threads=1, size=(_SMALL, _SMALL), with_flow=data.has_flow)
    return [_count_frames, partial(_decode_windows, dali)]


def _count_frames(parts: Mapping[str, bytes], info: SampleInfo) -> Iterator[str]:
    for extension in sorted(set(parts) - {INFO_EXTENSION}):
        count = sum(1 for _ in decode_luma(parts[extension], info.key))
        if count != info.num_frames:
            yield f"{extension} decodes to {count} frames, expected {info.num_frames}"


def _decode_windows(backend: Backend, parts: Mapping[str, bytes], info: SampleInfo) -> Iterator[str]:
    shape = ClipShape(frames=_WINDOW, height=_SMALL, width=_SMALL)
    for start in range(0, info.num_frames, _WINDOW):
        frames = tuple(range(start, min(start + _WINDOW, info.num_frames)))
        plan = ClipPlan(frames=frames, crop=(0, 0, info.height, info.width))
        rgb, flow = parts[RGB_EXTENSION], parts.get(FLOW_EXTENSION)
        raw = backend.decode([ClipRequest(key=info.key, rgb=rgb, flow=flow, info=info, plan=plan, shape=shape)])
        assert raw.frames is not None
        if raw.frames.shape[1] != len(frames):
            yield f"DALI gives {raw.frames.shape[1]} of the frames {frames[0]} to {frames[-1]}"


def _shard_problems(data: DataSet, shard: ShardInfo, decoders: Sequence[Decoder], labels: set[int]) -> Iterator[str]:
    path, name = shard.path, shard.path.name
    try:
        reader = shard.open()
    except (UserError, DamagedShardError) as error:
        yield str(error)
        return
    with reader:
        size = path.stat().st_size
        if size != shard.bytes:
            yield f"{name}: {size} bytes, the manifest says {shard.bytes}"
        elif file_sha256(path) != shard.sha256:
            yield f"{name}: its content has changed since it was written (sha256 differs)"
        if len(reader) != shard.samples:
            yield f"{name}: {len(reader)} samples in the index, the manifest says {shard.samples}"
        if reader.components() != _members(path):
            yield f"{name}: the index does not match the tar"
        for index in range(len(reader)):
            key = reader.key(index)
            try:
                for problem in _sample_problems(data, key, reader.read(index), decoders, labels):
                    yield f"{name}: {key}: {problem}"
            except DecodeError as error:
                yield f"{name}: {key}: {error.reason}"


def _sample_problems(
    data: DataSet, key: str, parts: Mapping[str, bytes], decoders: Sequence[Decoder], labels: set[int]
) -> Iterator[str]:
    wanted = {RGB_EXTENSION, INFO_EXTENSION} | ({FLOW_EXTENSION} if data.has_flow else set())
    if set(parts) != wanted:
        yield f"holds {', '.join(sorted(parts))}; expected {', '.join(sorted(wanted))}"
        return
    info = SampleInfo.from_json(key, parts[INFO_EXTENSION])
    labels.add(info.label)
    if not 0 <= info.label < len(data.classes) or data.classes[info.label] != info.class_name:
        yield f"label {info.label} is not class {info.class_name}"
    video = inspect_video(parts[RGB_EXTENSION], key)
    yield from _video_problems("RGB", video, data, info, (info.width, info.height))
    if video.full_range:
        yield "RGB is tagged full range; it must be limited"
    if data.has_flow:
        flow = inspect_video(parts[FLOW_EXTENSION], key)
        yield from _video_problems("flow", flow, data, info, (info.flow_width or 0, 2 * (info.flow_height or 0)))
        if not flow.full_range:
            yield "flow is not tagged full range in the bitstream: GPU decoders would lose codes"
    for decoder in decoders:
        yield from decoder(parts, info)


def _video_problems(
    what: str, video: StoredVideo, data: DataSet, info: SampleInfo, size: tuple[int, int]
) -> Iterator[str]:
    if video.codec != data.codec:
        yield f"{what} is {video.codec}, expected {data.codec}"
    if (video.width, video.height) != size:
        yield f"{what} is {video.width}x{video.height}, expected {size[0]}x{size[1]}"
    if video.num_frames != info.num_frames:
        yield f"{what} has {video.num_frames} frames, expected {info.num_frames}"


def _members(path: Path) -> list[tuple[str, int, int]] | None:
    """Name, offset and size of every file in the tar; None for a damaged tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    except (tarfile.TarError, OSError):
        return None


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rev2net verify` to a parser."""
    parser.description = "Check a prepared data set: hashes, indexes, counts, tags, and with --deep every frame."
    parser.epilog = "examples:\n  rev2net verify data\n  rev2net verify data --deep"
    parser.add_argument("data", metavar="DATA", help="folder that `rev2net prepare` made, or its URL")
    parser.add_argument("--deep", action="store_true", help="decode every frame of every video")


def run_verify(args: argparse.Namespace) -> int:
    """Run `rev2net verify`; returns the exit status, raises UserError for a user's mistake."""
    with _opened(args.data) as data:
        problems = _problems(data, args.deep)
    for problem in problems:
        print(problem, file=sys.stderr)
    counts = ", ".join(f"{split} {data.num_samples(split)}" for split in data.splits)
    print(f"{args.data}: {counts} samples, {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0
