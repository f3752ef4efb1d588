"""Clip plans: everything random about a clip, drawn on the host before any decoder sees it.

A backend executes a plan and draws nothing, so that DALI on a GPU, DALI on a CPU and PyAV give the same clip, and the
clip of a (seed, epoch, sample) never changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataloaders.errors import UserError
from dataloaders.keyed import Draws, Purpose
from dataloaders.shards import SampleInfo

Crop = tuple[int, int, int, int]
"""top, left, height, width in pixels."""

Colour = tuple[float, ...]
"""Twelve numbers: the rows of a 3x4 matrix that maps (R, G, B, 1), R G B in [0, 255], to the new R, G, B."""

IDENTITY_COLOUR: Colour = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_LUMA = np.array([0.299, 0.587, 0.114])
_MID_GRAY = 127.5
_RGB_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_WHOLE_VIDEO_MULTIPLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipShape:
    """Size of a clip as the network sees it.

    Attributes:
        frames: all of them.
        stride: distance of consecutive frames, in stored frames.
        segments: 0, or the number of equal parts of the video from each of which comes an equal share of the frames,
            consecutive ones (TSN, Wang et al. 2016, section 3.1).
    """

    frames: int
    height: int
    width: int
    stride: int = 1
    segments: int = 0

    @property
    def run(self) -> int:
        """Frames that follow one another."""
        return self.frames // self.segments if self.segments else self.frames

    @property
    def span(self) -> int:
        """Stored frames from the first to the last of a run."""
        return (self.run - 1) * self.stride + 1

    def starts(self, num_frames: int) -> int:
        """Number of frames of a video at which a run can start; one shorter than the run is looped, from any frame."""
        return num_frames - self.span + 1 if self.span <= num_frames else num_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """Strengths of the training augmentation.

    Attributes:
        scales: sides of the random crop relative to the largest one that fits. Height and width are drawn as
            neighbours in this tuple, so that the aspect ratio changes a little (TSN, Wang et al. 2016).
        flip: probability of the horizontal flip.
        brightness, contrast, saturation: factors are drawn from [1 - x, 1 + x].
        hue: the turn is drawn from [-x, x], where 1 is the whole colour circle.

    Raises:
        UserError: a value outside its range.
    """

    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise UserError(f"augment.scales is {list(self.scales)}; give at least one number in (0, 1]")
        for name, upper in (("flip", 1.0), ("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            value = getattr(self, name)
            if not 0 <= value <= upper:
                raise UserError(f"augment.{name} is {value}; give a number from 0 to {upper:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """What to cut out of a stored video.

    Attributes:
        frames: indices of the clip's frames in the stored video, in the clip's order.
        crop: in pixels of the stored RGB video; it is resized to the clip's shape.
        flip: mirror left and right after the resize.
        colour: see Colour.
        backwards: the frames run against time, so the flow of a frame is the negated one that leads to it.
    """

    frames: tuple[int, ...]
    crop: Crop
    flip: bool = False
    colour: Colour = IDENTITY_COLOUR
    backwards: bool = False

    @property
    def flow_frames(self) -> tuple[int, ...]:
        """Indices of the stored flow frames that belong to `frames`."""
        return tuple(max(0, frame - 1) for frame in self.frames) if self.backwards else self.frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Which clips of a video are scored at test time: temporal x spatial, or the whole video with a centre crop."""

    temporal: int = 10
    spatial: int = 3
    whole: bool = False

    @classmethod
    def parse(cls, text: str) -> Views:
        """Read `10x3`, `10x1`, `1x1`, `whole` and their like; UserError for anything else."""
        if text == "whole":
            return cls(temporal=1, spatial=1, whole=True)
        found = re.fullmatch("([1-9][0-9]{0,2})x([13])", text)
        if found is None:
            told = text if len(text) < 20 else f"{text[:20]}..."
            raise UserError(
                f"views {told!r} are unknown; give Tx1 or Tx3 with T clips in time (to 999), as 10x3, or whole"
            )
        return cls(temporal=int(found[1]), spatial=int(found[2]))

    @property
    def count(self) -> int:
        """Clips of one video."""
        return self.temporal * self.spatial


def train_plan(info: SampleInfo, shape: ClipShape, augment: Augment, *, seed: int, epoch: int, sample: int) -> ClipPlan:
    """Draw a training clip: random position in time (in each segment), multi-scale random crop, flip, colour jitter."""
    draws = Draws(Purpose.CLIP_PLAN, seed, epoch, sample)
    possible = shape.starts(info.num_frames)
    if shape.segments:
        starts = [_in_segment(possible, shape.segments, k, draws.uniform()) for k in range(shape.segments)]
    else:
        starts = [draws.below(possible)]
    return ClipPlan(
        frames=_clip_frames(info, shape, starts),
        crop=_random_crop(info, shape, augment, draws),
        flip=draws.uniform() < augment.flip,
        colour=_jitter(augment, draws),
    )


def test_views(
    info: SampleInfo, shape: ClipShape, temporal: int, spatial: int, *, backwards: bool = False
) -> list[ClipPlan]:
    """The clips of one video at test time, those of the same frames one after the other.

    Clips stand evenly from the first to the last possible position (one clip: in the middle); with segments they stand
    evenly inside each segment. The crop is the largest of the clip's aspect ratio; three crops stand at the ends and in
    the middle of the video's longer side.
    """
    room = max(0, info.num_frames - shape.span)
    if shape.segments:
        possible, segments = shape.starts(info.num_frames), shape.segments
        parts = [(k + 0.5) / temporal for k in range(temporal)]
        starts = [[_in_segment(possible, segments, k, part) for k in range(segments)] for part in parts]
    elif temporal == 1:
        starts = [[room // 2]]
    else:
        starts = [[round(k * room / (temporal - 1))] for k in range(temporal)]
    plans = []
    for each in starts:
        frames = _clip_frames(info, shape, each)
        for part in (0.5,) if spatial == 1 else (0.0, 0.5, 1.0):
            crop = _placed_crop(info, shape, part)
            plans.append(_in_direction(frames, crop, backwards))
    return plans


def whole_video(info: SampleInfo, shape: ClipShape, *, backwards: bool = False) -> ClipPlan:
    """All frames (every `stride`-th) with the centre crop; looped to a multiple of 8 frames."""
    frames = tuple(range(0, info.num_frames, shape.stride))
    looped = frames * _WHOLE_VIDEO_MULTIPLE
    length = math.ceil(len(frames) / _WHOLE_VIDEO_MULTIPLE) * _WHOLE_VIDEO_MULTIPLE
    return _in_direction(looped[:length], _placed_crop(info, shape, 0.5), backwards)


def flow_crop(info: SampleInfo, crop: Crop) -> Crop:
    """The crop in pixels of one flow plane (the flow may be stored smaller than the RGB video)."""
    assert info.flow_height is not None and info.flow_width is not None
    top, left, height, width = crop
    tall, wide = info.flow_height / info.height, info.flow_width / info.width
    flow_height = max(1, round(height * tall))
    flow_width = max(1, round(width * wide))
    flow_top = min(round(top * tall), info.flow_height - flow_height)
    flow_left = min(round(left * wide), info.flow_width - flow_width)
    return flow_top, flow_left, flow_height, flow_width


def _in_direction(frames: tuple[int, ...], crop: Crop, backwards: bool) -> ClipPlan:
    return ClipPlan(frames=frames[::-1] if backwards else frames, crop=crop, backwards=backwards)


def _clip_frames(info: SampleInfo, shape: ClipShape, starts: Sequence[int]) -> tuple[int, ...]:
    return tuple((start + k * shape.stride) % info.num_frames for start in starts for k in range(shape.run))


def _in_segment(possible: int, segments: int, segment: int, part: float) -> int:
    """A start in one of equal segments of all `possible` ones, `part` in [0, 1) of the way through it."""
    first, last = segment * possible // segments, (segment + 1) * possible // segments
    return min(first + int(part * max(1, last - first)), possible - 1)


def _grid(info: SampleInfo) -> int:
    # Even coordinates stay whole numbers in a flow video of half the size.
    return 2 if min(info.height, info.width) >= 4 else 1


def _largest(info: SampleInfo, shape: ClipShape) -> tuple[float, float]:
    """Height and width of the largest crop with the clip's aspect ratio."""
    scale = min(info.height / shape.height, info.width / shape.width)
    return scale * shape.height, scale * shape.width


def _snap(length: float, grid: int) -> int:
    return max(1, int(length / grid + 1e-6)) * grid


def _random_crop(info: SampleInfo, shape: ClipShape, augment: Augment, draws: Draws) -> Crop:
    last = len(augment.scales) - 1
    pairs = [(i, j) for i in range(last + 1) for j in range(max(0, i - 1), min(last, i + 1) + 1)]
    tall, wide = pairs[draws.below(len(pairs))]
    grid = _grid(info)
    full_height, full_width = _largest(info, shape)
    height = _snap(full_height * augment.scales[tall], grid)
    width = _snap(full_width * augment.scales[wide], grid)
    top = grid * draws.below((info.height - height) // grid + 1)
    left = grid * draws.below((info.width - width) // grid + 1)
    return top, left, height, width


def _placed_crop(info: SampleInfo, shape: ClipShape, part: float) -> Crop:
    """The largest crop; `part` of the free room lies before it (half in the direction that has next to none)."""
    grid = _grid(info)
    height, width = (_snap(side, grid) for side in _largest(info, shape))
    room_y, room_x = info.height - height, info.width - width
    part_y, part_x = (part, 0.5) if room_y > room_x else (0.5, part)
    return grid * int(room_y * part_y / grid), grid * int(room_x * part_x / grid), height, width


def _jitter(augment: Augment, draws: Draws) -> Colour:
    """Brightness, contrast around mid gray, saturation and hue, composed in this order; all are linear."""
    strengths = (augment.brightness, augment.contrast, augment.saturation)
    brightness, contrast, saturation = (draws.uniform(1 - x, 1 + x) for x in strengths)
    turn = 2 * math.pi * draws.uniform(-augment.hue, augment.hue)
    if not any((*strengths, augment.hue)):
        return IDENTITY_COLOUR
    gray = np.tile(_LUMA, (3, 1))
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    mixed = saturation * np.eye(3) + (1 - saturation) * gray
    linear = np.linalg.inv(_RGB_TO_YIQ) @ rotation @ _RGB_TO_YIQ @ mixed
    # Gray is a fixed point of saturation and hue, so the constant passes them unchanged.
    constant = np.full((3, 1), (1 - contrast) * _MID_GRAY)
    matrix = np.concatenate([linear * (contrast * brightness), constant], axis=1)
    return tuple(float(value) for value in matrix.ravel())
