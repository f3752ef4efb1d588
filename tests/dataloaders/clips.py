"""Small source videos for the tests of the preparation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]


def texture(height: int, width: int, seed: int = 0) -> Picture:
    """A smooth random gray texture, uint8 [H, W]."""
    noise = np.random.default_rng(seed).normal(size=(height, width))
    for axis in (0, 1):
        for _ in range(3):
            noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    noise -= noise.min()
    return (noise * (255 / noise.max())).astype(np.uint8)


def moving(count: int = 14, height: int = 64, width: int = 64, step: int = 1, seed: int = 0) -> list[Picture]:
    """RGB pictures of a texture that moves `step` pixels a frame to the right."""
    base = texture(height, width, seed)
    return [np.repeat(np.roll(base, step * t, 1)[..., None], 3, 2) for t in range(count)]


def write_video(
    path: Path,
    pictures: Iterable[Picture],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 25,
    times: Iterable[int] | None = None,
    tags: Mapping[str, int] | None = None,
    crf: int = 8,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """Encode RGB pictures; `times` are presentation times in 1/1000 s, options those of FFmpeg's encoder and muxer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clock = iter(times) if times is not None else None
    options = ({"crf": str(crf)} if codec == "libx264" else {}) | dict(options or {})
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.pix_fmt = pix_fmt
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        if clock is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if tags:
                frame = frame.reformat(
                    format=pix_fmt,
                    dst_colorspace=tags["colorspace"],
                    src_color_range=2,
                    dst_color_range=tags["color_range"],
                )
            frame.pts = number if clock is None else next(clock)
            frame.time_base = Fraction(1, 1000) if clock is not None else 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_source(root: Path, classes: Sequence[str] = ("jump", "run"), clips: int = 3, frames: int = 6) -> Path:
    """A folder per class of videos, each class with its own motion."""
    for c, name in enumerate(classes):
        for i in range(clips):
            pictures = moving(frames, 64, 80, step=2 * c + 1, seed=10 * c + i)
            write_video(root / name / f"{name} {i}.mp4", pictures)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
