"""Small data sets, made of the real parts: encoder, shard writer, manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from dataloaders.flow.codes import encode_flow
from dataloaders.shards import (
    FLOW_EXTENSION,
    FORMAT,
    INFO_EXTENSION,
    RGB_EXTENSION,
    DataSet,
    SampleInfo,
    ShardWriter,
    shard_name,
    write_manifest,
)
from dataloaders.video import Codec, VideoEncoder, flow_picture

Picture = npt.NDArray[np.uint8]


def pictures(count: int, height: int, width: int, seed: int) -> list[Picture]:
    """Coloured waves, each in a direction of its own, RGB uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    angle, speed, phase = rng.uniform(0, 6.28, 3), rng.uniform(0.2, 0.6, 3), rng.uniform(0, 6.28, 3)
    waves = [(np.cos(a) * x + np.sin(a) * y) / 9 for a in angle]
    return [
        np.stack([127 + 100 * np.sin(waves[c] + speed[c] * t + phase[c]) for c in range(3)], -1).astype(np.uint8)
        for t in range(count)
    ]


def encode_rgb(frames: Sequence[Picture], codec: Codec, fps: Fraction = Fraction(25)) -> bytes:
    height, width = frames[0].shape[:2]
    encoder = VideoEncoder(codec, "rgb", width, height, fps)
    for frame in frames:
        made = av.VideoFrame.from_ndarray(frame, format="rgb24")
        converted = made.reformat(format="yuv420p", dst_colorspace=5, src_color_range=2, dst_color_range=1)
        encoder.add(converted.to_ndarray())
    return encoder.finish()


def encode_codes(codes: Sequence[Picture], codec: Codec, fps: Fraction = Fraction(25)) -> bytes:
    """Stacked flow planes, uint8 [2h, w] each."""
    height, width = codes[0].shape
    encoder = VideoEncoder(codec, "flow", width, height, fps)
    for plane in codes:
        encoder.add(flow_picture(plane))
    return encoder.finish()


def smooth_flow(count: int, height: int, width: int, seed: int) -> npt.NDArray[np.float32]:
    """float32 [T, 2, h, w], up to 12 pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    a, b = rng.uniform(0.02, 0.08, 2), rng.uniform(0, 6.28, 2)
    still = np.stack([12 * np.sin(a[c] * x + b[c]) * np.cos(a[1 - c] * y) for c in range(2)])
    return np.stack([still * np.cos(0.1 * t) for t in range(count)]).astype(np.float32)


def make_dataset(
    folder: Path,
    *,
    shard_sizes: Sequence[int] = (5, 3, 4),
    codec: Codec = "vp9",
    size: tuple[int, int] = (64, 96),
    flow_size: tuple[int, int] | None = None,
    lengths: Sequence[int] = (20, 30, 14),
    broken: Collection[int] = (),
) -> DataSet:
    """A data set with one split, `train`; samples in `broken` hold garbage instead of an RGB video."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    sample = 0
    for number, count in enumerate(shard_sizes):
        with ShardWriter(folder / shard_name("train", number)) as writer:
            for _ in range(count):
                writer.write(f"clip{sample:03d}", _sample(sample, codec, size, flow_size, lengths, sample in broken))
                sample += 1
        entry = writer.entry
        assert entry is not None
        entries.append({"file": entry.file, "samples": entry.samples, "bytes": entry.bytes, "sha256": entry.sha256})
    manifest = {
        "format": FORMAT,
        "classes": ["a", "b", "c"],
        "splits": {"train": {"samples": sample, "shards": entries}},
        "video": {"codec": codec, "fps": 25.0, "keyframe_interval": 12},
        "flow": None if flow_size is None else {"codec": codec, "scale": flow_size[0] / size[0], "bound": 20.0},
    }
    write_manifest(folder, manifest)
    return DataSet.open(folder)


def _sample(
    sample: int,
    codec: Codec,
    size: tuple[int, int],
    flow_size: tuple[int, int] | None,
    lengths: Sequence[int],
    broken: bool,
) -> dict[str, bytes]:
    count = lengths[sample % len(lengths)]
    parts = {RGB_EXTENSION: b"no video" * 100}
    if not broken:
        parts[RGB_EXTENSION] = encode_rgb(pictures(count, *size, seed=sample), codec)
    if flow_size is not None:
        parts[FLOW_EXTENSION] = encode_codes(list(encode_flow(smooth_flow(count, *flow_size, seed=sample))), codec)
    hashes = {extension: hashlib.sha256(data).hexdigest() for extension, data in parts.items()}
    info = SampleInfo(
        key=f"clip{sample:03d}",
        label=sample % 3,
        class_name="abc"[sample % 3],
        source=f"{sample}.avi",
        num_frames=count,
        fps=25.0,
        height=size[0],
        width=size[1],
        flow_height=flow_size[0] if flow_size else None,
        flow_width=flow_size[1] if flow_size else None,
        sha256=hashes,
    )
    return {**parts, INFO_EXTENSION: info.to_json()}
