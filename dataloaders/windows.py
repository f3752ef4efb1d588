"""Clips of any video file, cut as those of a prepared data set are; memory does not grow with the file's length."""

from __future__ import annotations

import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from dataloaders.batch import ClipRequest, RawClips, Stream, to_batch
from dataloaders.errors import DecodeError
from dataloaders.plan import ClipPlan, ClipShape, Views, test_views, whole_video
from dataloaders.pyav_backend import Picture, flow_clip, rgb_clip, to_rgb
from dataloaders.shards import SampleInfo
from dataloaders.transcode import PrepareSettings, stored_flow
from dataloaders.video import I420, VideoSource, flow_size, gray, stored_size

_CHUNK = 16
"""Frame pairs per call of the flow estimator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A piece of a video, treated as a video of its own.

    Attributes:
        start, end: in seconds from the video's first frame.
        pictures: its frames at the size and rate of the prepared data set.
        info: their sizes and number.
    """

    start: float
    end: float
    pictures: Sequence[I420]
    info: SampleInfo

    def clips(
        self, shape: ClipShape, views: Views, stream: Stream, *, batch: int, device: torch.device
    ) -> Iterator[torch.Tensor]:
        """Its test views, float32 [N, C, T, H, W] with N up to `batch`, as `ClipBatch` has them."""
        if views.whole:
            plans = [whole_video(self.info, shape)]
            shape = ClipShape(frames=len(plans[0].frames), height=shape.height, width=shape.width)
        else:
            plans = test_views(self.info, shape, views.temporal, views.spatial)
        seen = self._rgb(plans) if stream == "rgb" else self._flow()
        for first in range(0, len(plans), batch):
            requests = [
                ClipRequest(key=self.info.key, rgb=None, flow=None, info=self.info, plan=plan, shape=shape)
                for plan in plans[first : first + batch]
            ]
            cut = rgb_clip if stream == "rgb" else flow_clip
            made = torch.stack([cut(request, [seen[i] for i in request.plan.frames]) for request in requests])
            raw = RawClips(frames=made, flow=None) if stream == "rgb" else RawClips(frames=None, flow=made)
            yield to_batch(raw, requests, device).stream(stream)

    def _rgb(self, plans: Sequence[ClipPlan]) -> dict[int, Picture]:
        convert = to_rgb()
        wanted = {frame for plan in plans for frame in plan.frames}
        return {i: convert(av.VideoFrame.from_ndarray(self.pictures[i], format="yuv420p")) for i in wanted}

    def _flow(self) -> dict[int, Picture]:
        """Stacked planes of codes; the last flow stands twice, as in a prepared data set."""
        height, width = self.info.flow_height, self.info.flow_width
        assert height is not None and width is not None
        planes: list[Picture] = []
        for first in range(0, len(self.pictures) - 1, _CHUNK):
            frames = np.stack([gray(picture) for picture in self.pictures[first : first + _CHUNK + 1]])
            planes += list(stored_flow(frames, height, width))
        if planes:
            planes.append(planes[-1])
        else:  # a single frame, which moves nowhere
            planes += stored_flow(np.stack([gray(self.pictures[0])] * 2), height, width)
        return dict(enumerate(planes))


def windows(
    source: VideoSource, settings: PrepareSettings, *, key: str, seconds: float, every: float
) -> Iterator[Window]:
    """The windows of a video, in order; together they hold all of it where `every` is not longer than `seconds`.

    A video that is shorter than a window is one. The last window ends with the video, so it may overlap the one before.

    Args:
        source: is read once.
        settings: of the data set that the network learned from.
        key: what errors call the video.
        seconds: length of a window.
        every: distance of their starts, in seconds.

    Raises:
        DecodeError: the video is damaged. What stands before the damage has been given by then.
    """
    width, height = stored_size(
        source.width, source.height, codec=settings.codec, short_side=settings.short_side, size=settings.size
    )
    fps = float(settings.fps or source.fps)
    length, hop = (max(1, round(min(span * fps, sys.maxsize // 2))) for span in (seconds, every))
    flow_width, flow_height = flow_size(width, height, codec=settings.codec, scale=settings.flow_scale or 1.0)

    def window(first: int, pictures: Sequence[I420]) -> Window:
        info = SampleInfo(
            key=key, label=-1, class_name="", source=key, num_frames=len(pictures), fps=fps,
            height=height, width=width, flow_height=flow_height, flow_width=flow_width,
        )  # fmt: skip
        return Window(start=first / fps, end=(first + len(pictures)) / fps, pictures=pictures, info=info)

    held: deque[I420] = deque(maxlen=length)
    count = start = end = 0
    damage: DecodeError | None = None
    try:
        for picture in source.frames(width, height, settings.fps):
            held.append(picture)
            count += 1
            if count == start + length:
                yield window(start, tuple(held))
                start, end = start + hop, count
    except DecodeError as error:
        damage = error
    if count > max(start, end) or (count and not end):
        yield window(count - len(held), tuple(held))
    if damage is not None:
        raise damage


def open_video(path: Path) -> VideoSource:
    """A video file of the user's, decoded on all cores; DecodeError says what it is that is no video."""
    try:
        there = path.stat()
    except OSError as error:
        lost = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise DecodeError(str(path), "there is no such file" if lost else str(error.strerror)) from None
    if not stat.S_ISREG(there.st_mode):
        what = "a folder" if stat.S_ISDIR(there.st_mode) else "no plain file"
        raise DecodeError(str(path), f"it is {what}, give video files")
    return VideoSource(path, threads=0)
