"""A copy of a video with the classes of its windows written into the picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from dataloaders.errors import DecodeError
from dataloaders.shards import written_aside
from dataloaders.video import I420, tag
from dataloaders.windows import open_video

if TYPE_CHECKING:
    from rev2net.predict import Scored

LINES = 3
"""Classes that are written into a picture."""

_BLACK, _WHITE, _GRAY = 16, 235, 128
"""Luma of BT.601's limited range, and chroma of anything gray."""


def annotate(video: Path, out: Path, windows: Sequence[Scored], classes: Sequence[str]) -> None:
    """Write `out` (H.264, no sound): each frame with the highest classes of the window that begins last before it.

    The video is decoded once more, so that memory does not grow with its length. Damage ends the copy.

    Raises:
        OSError: `out` cannot be written; nothing is left of it then.
    """
    with (
        written_aside(out) as aside,
        open_video(video) as source,
        av.open(f"file:{aside}", "w", format="mp4") as container,  # a path like run:1/a.mp4 is an address without
    ):
        width, height = max(2, source.width // 2 * 2), max(2, source.height // 2 * 2)
        stream = container.add_stream("libx264", rate=source.fps, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        tag(stream.codec_context)  # a player would take a large picture without for another matrix
        _write(container, stream, source.frames(width, height, source.fps), source.fps, windows, classes)


def _write(
    container: Any, stream: Any, frames: Any, fps: Fraction, windows: Sequence[Scored], classes: Sequence[str]
) -> None:
    current, strip = -1, None
    for number, picture in enumerate(_up_to_damage(frames)):
        before = current
        while current + 1 < len(windows) and windows[current + 1].start <= number / fps:
            current += 1
        if current != before or strip is None:
            height, width = picture.shape[0] * 2 // 3, picture.shape[1]
            strip = _strip(windows[current].top(classes, LINES), width, height)
        frame = av.VideoFrame.from_ndarray(_laid_over(picture, strip), format="yuv420p")
        tag(frame)
        frame.pts, frame.time_base = number, 1 / fps
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _up_to_damage(frames: Iterable[I420]) -> Iterator[I420]:
    with suppress(DecodeError):  # which the prediction has told
        yield from frames


def _strip(lines: Sequence[tuple[str, float]], width: int, height: int) -> npt.NDArray[np.uint8]:
    """White text on black, uint8 [h, w] with even sides, not larger than the picture."""
    size = max(8, min(height // 16, width // 24))
    font = ImageFont.load_default(size)
    text = "\n".join(f"{name} {score:.0%}" for name, score in lines)
    pad = size // 2
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((pad, pad), text, font=font)
    picture = Image.new("L", (min(width, int(right) + pad) // 2 * 2, min(height, int(bottom) + pad) // 2 * 2))
    ImageDraw.Draw(picture).multiline_text((pad, pad), text, fill=255, font=font)
    return np.asarray(picture)


def _laid_over(picture: I420, strip: npt.NDArray[np.uint8]) -> I420:
    """A picture with the strip in its upper left corner."""
    rows, columns = strip.shape
    height, width = picture.shape[0] * 2 // 3, picture.shape[1]
    made = picture.copy()
    made[:rows, :columns] = _BLACK + (strip.astype(np.uint16) * (_WHITE - _BLACK) // 255).astype(np.uint8)
    chroma = made[height:].reshape(2, height // 2, width // 2)
    chroma[:, : rows // 2, : columns // 2] = _GRAY
    return made
