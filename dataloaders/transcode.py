"""One source clip becomes the parts of a sample: RGB video, flow video, description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
import torch

from dataloaders.errors import DecodeError, UserError
from dataloaders.flow import encode_flow, tvl1
from dataloaders.flow.batched import tvl1_batched
from dataloaders.shards import FLOW_EXTENSION, INFO_EXTENSION, RGB_EXTENSION, SampleInfo, hashes_of
from dataloaders.sources import SourceClip
from dataloaders.video import (
    BLOCK,
    MINIMUM,
    Codec,
    VideoEncoder,
    VideoSource,
    flow_picture,
    flow_size,
    gray,
    stored_size,
)

FLOW_SCALES = (0.5, 1.0)
_LARGEST = 8192  # of NVDEC
FlowDevice = Literal["cpu", "cuda"]
_CHUNK: dict[FlowDevice, int] = {"cpu": 16, "cuda": 64}
"""Frame pairs per call of the estimator: memory stays the same for a clip of any length."""


DECODING = 2
"""How sources are read, as one of a data set's settings. By 1 some AVIs (all of HMDB51's) had frames dropped and
doubled, interlaced pictures were combed, and most files that were cut off passed for whole."""


def changed_settings(found: Mapping[str, Any], wanted: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The settings in which those of a manifest and those of `to_json` differ: both values, the manifest's first."""
    found = {"decoding": 1, **found}  # in those from before it was written
    both = {name: (found.get(name), wanted.get(name)) for name in dict.fromkeys([*wanted, *found])}
    return {name: (there, here) for name, (there, here) in both.items() if there != here}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """What decides the bytes of a prepared data set.

    Attributes:
        codec: h264, or vp9 for machines on which DALI has no NVDEC.
        fps: constant frame rate; None keeps each source's average rate and all its frames.
        short_side: of the stored RGB video, in pixels; None when `size` is given.
        size: width and height for all clips, whatever their aspect ratio.
        flow_scale: size of the flow video relative to the RGB video; None stores no flow.
        flow_device: where TV-L1 runs; the two differ by 0.01 pixel on average.
        seed: of the order of the samples.
        shard_bytes: shards are cut to about this size.
    """

    codec: Codec = "h264"
    fps: Fraction | None = Fraction(25)
    short_side: int | None = 256
    size: tuple[int, int] | None = None
    flow_scale: float | None = 0.5
    flow_device: FlowDevice = "cpu"
    seed: int = 0
    shard_bytes: int = 256 * 2**20

    def check(self) -> None:
        """Raise UserError for values that cannot be stored."""
        if self.codec not in MINIMUM:
            raise UserError(f"codec is {self.codec!r}; give one of {', '.join(MINIMUM)}")
        if (self.short_side is None) == (self.size is None):
            raise UserError("give either a short side or a size, not both")
        for length in self.size or (self.short_side or 0,):
            if length < BLOCK or length % BLOCK:
                near = max(BLOCK, round(length / BLOCK) * BLOCK)
                raise UserError(f"size {length} is not a multiple of {BLOCK}; give for example {near}")
            if length > _LARGEST:
                raise UserError(f"size {length} is too large; give {_LARGEST} or less")
        least = MINIMUM[self.codec]
        if self.size is not None and (self.size[0] < least[0] or self.size[1] < least[1]):
            raise UserError(
                f"size {self.size[0]}x{self.size[1]} is below {least[0]}x{least[1]}, the smallest "
                f"{self.codec} that NVDEC decodes; give a larger --size or another --codec"
            )
        if self.flow_scale is not None and self.flow_scale not in FLOW_SCALES:
            raise UserError(f"flow scale is {self.flow_scale}; give one of {FLOW_SCALES}")
        if self.flow_scale is not None and self.flow_device == "cuda" and not torch.cuda.is_available():
            raise UserError("--flow-device is cuda, but PyTorch sees no GPU here; give --flow-device cpu")
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise UserError(f"fps is {str(self.fps)[:20]}; give 1 to 240, or `source` for each video's own")
        if self.shard_bytes < 1:
            raise UserError(f"shards of {self.shard_bytes} bytes are too small; give 1 MB or more")

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> PrepareSettings:
        """Read what `to_json` made, flow on the CPU; UserError where it is not that."""
        try:
            fps, size = raw["fps"], raw["size"]
            exact = {"fps": None if fps is None else Fraction(fps), "size": None if size is None else tuple(size)}
            own = {name: value for name, value in raw.items() if name != "decoding"}
            settings = cls(**{**own, **exact, "flow_device": "cpu"})
            settings.check()
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"settings of a preparation are damaged ({error}): use another file") from error
        return settings

    def to_json(self) -> dict[str, object]:
        """Plain values, for the manifest."""
        # Only where it changes the bytes.
        device = {"flow_device": self.flow_device} if self.flow_scale is not None and self.flow_device != "cpu" else {}
        return {
            "decoding": DECODING,
            "codec": self.codec,
            "fps": None if self.fps is None else str(self.fps),
            "short_side": self.short_side,
            "size": None if self.size is None else list(self.size),
            "flow_scale": self.flow_scale,
            **device,
            "seed": self.seed,
            "shard_bytes": self.shard_bytes,
        }


def transcode(clip: SourceClip, settings: PrepareSettings) -> dict[str, bytes]:
    """Decode, resize, estimate flow and encode; frame by frame, so that memory does not grow with the clip.

    Returns:
        The sample's parts by extension: RGB video, flow video unless switched off, description.

    Raises:
        DecodeError: the source cannot be decoded, or not be stored in this size.
    """
    try:
        return _transcode(clip, settings)
    except av.error.FFmpegError as error:  # VideoSource has its own: this one is an encoder's
        raise DecodeError(clip.relative, f"cannot be encoded ({error})") from error


def _transcode(clip: SourceClip, settings: PrepareSettings) -> dict[str, bytes]:
    with VideoSource(clip.path) as source:
        width, height = stored_size(
            source.width,
            source.height,
            codec=settings.codec,
            short_side=settings.short_side,
            size=settings.size,
        )
        fps = settings.fps or source.fps
        rgb = VideoEncoder(settings.codec, "rgb", width, height, fps)
        flow = None
        if settings.flow_scale is not None:
            flow = FlowTrack(
                width, height, fps, codec=settings.codec, scale=settings.flow_scale, device=settings.flow_device
            )
        for picture in source.frames(width, height, settings.fps):
            rgb.add(picture)
            if flow is not None:
                flow.add(gray(picture))
    parts = {RGB_EXTENSION: rgb.finish()}
    if flow is not None:
        parts[FLOW_EXTENSION] = flow.finish()
    info = SampleInfo(
        key=clip.key,
        label=clip.label,
        class_name=clip.class_name,
        source=clip.relative,
        num_frames=rgb.count,
        fps=float(fps),
        height=height,
        width=width,
        flow_height=None if flow is None else flow.height,
        flow_width=None if flow is None else flow.width,
        source_bytes=clip.path.stat().st_size,
        sha256=hashes_of(parts),
    )
    return {**parts, INFO_EXTENSION: info.to_json()}


class FlowTrack:
    """Turns gray frames into a flow video of as many frames; the last flow stands twice.

    Attributes:
        width, height: of one flow plane.
    """

    def __init__(
        self, width: int, height: int, fps: Fraction, *, codec: Codec, scale: float, device: FlowDevice
    ) -> None:
        self.width, self.height = flow_size(width, height, codec=codec, scale=scale)
        self._encoder = VideoEncoder(codec, "flow", self.width, 2 * self.height, fps)
        self._device = device
        self._waiting: list[npt.NDArray[np.uint8]] = []
        self._last = flow_picture(encode_flow(np.zeros((1, 2, self.height, self.width), np.float32))[0])

    def add(self, frame: npt.NDArray[np.uint8]) -> None:
        """Take the next gray frame, uint8 [H, W]."""
        self._waiting.append(frame)
        if len(self._waiting) > _CHUNK[self._device]:
            self._flush()

    def finish(self) -> bytes:
        """The flow video."""
        self._flush()
        self._encoder.add(self._last)
        return self._encoder.finish()

    def _flush(self) -> None:
        if len(self._waiting) < 2:
            return
        for codes in stored_flow(np.stack(self._waiting), self.height, self.width, self._device):
            self._last = flow_picture(codes)
            self._encoder.add(self._last)
        del self._waiting[:-1]


def stored_flow(
    frames: npt.NDArray[np.uint8], height: int, width: int, device: FlowDevice = "cpu"
) -> npt.NDArray[np.uint8]:
    """TV-L1 flow from each gray frame to the next, as it is stored.

    Args:
        frames: uint8 [T, H, W].
        height, width: of one stored flow plane.

    Returns:
        uint8 [T - 1, 2 * height, width], the codes of `encode_flow`, in pixels of the frames.
    """
    if device == "cpu":
        flow = tvl1(frames, threads=1)
    else:
        flow = tvl1_batched(torch.from_numpy(frames).to(device)).cpu().numpy()
    return encode_flow(area_average(area_average(flow, height, 2), width, 3))


def area_average(values: npt.NDArray[np.float32], length: int, axis: int) -> npt.NDArray[np.float32]:
    """Shrink one axis to `length` by averaging the part that each output pixel covers, also fractions of pixels.

    No linear algebra library takes part, so the result does not depend on a number of threads.
    """
    before = values.shape[axis]
    if length == before:
        return values
    edges = np.arange(length + 1) * (before / length)
    first = np.floor(edges[:-1]).astype(np.int64)
    shape = [1] * values.ndim
    shape[axis] = length
    total = np.zeros((), np.float32)
    for tap in range(int(np.ceil(edges[1:] - first).max())):
        at = first + tap
        share = np.minimum(edges[1:], at + 1) - np.maximum(edges[:-1], at)
        weights = (np.clip(share, 0, None) * (length / before)).astype(np.float32)
        total = total + values.take(np.minimum(at, before - 1), axis) * weights.reshape(shape)
    return total
