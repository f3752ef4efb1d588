"""Clips by PyAV: works everywhere, for every codec that FFmpeg reads.

One clip is decoded by one thread. PyAV and torch let go of the interpreter lock while they work, so clips run side by
side in a thread pool. Clips of the same video in one call (test views) share the decoding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from typing import Any

import av
import av.error
import numpy as np
import numpy.typing as npt
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from dataloaders.batch import ClipRequest, RawClips
from dataloaders.errors import DecodeError
from dataloaders.plan import flow_crop
from dataloaders.trim import needed_packets
from dataloaders.video import video_stream

Picture = npt.NDArray[np.uint8]

# Chroma brought to full resolution by bilinear interpolation, exact rounding: the very bytes that DALI makes on a CPU.
# Without these flags swscale repeats chroma and is off by 1.3 levels on average, too dark by as much.
_CONVERSION = (
    Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)


class PyAVBackend:
    """Decodes on the CPU with `workers` threads; may be called from several threads."""

    def __init__(self, *, workers: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="pyav")

    def decode(self, requests: Sequence[ClipRequest]) -> RawClips:
        """See dataloaders.batch.Backend."""
        videos = [list(group) for _, group in groupby(requests, key=lambda r: (r.key, id(r.rgb), id(r.flow)))]
        futures = [self._pool.submit(_decode_views, video) for video in videos]
        clips = [clip for future in futures for clip in future.result()]
        streams = [[clip for clip in stream if clip is not None] for stream in zip(*clips, strict=True)]
        assert all(len(stream) in (0, len(clips)) for stream in streams), "all clips of the same streams"
        frames, flow = (torch.stack(stream) if stream else None for stream in streams)
        return RawClips(frames=frames, flow=flow)

    def close(self) -> None:
        """Stop the threads after the clips in hand."""
        self._pool.shutdown(cancel_futures=True)


Clip = tuple[torch.Tensor | None, torch.Tensor | None]
"""Frames uint8 [T, H, W, 3] and flow uint8 [T, H, W, 2]."""


def _decode_views(requests: Sequence[ClipRequest]) -> list[Clip]:
    """Clips of one video."""
    frames = _frames_of(requests)
    return list(zip(frames, _flows_of(requests), strict=True))


def _frames_of(requests: Sequence[ClipRequest]) -> Sequence[torch.Tensor | None]:
    key, info = requests[0].key, requests[0].info
    if requests[0].rgb is None:
        return [None] * len(requests)
    wanted = {frame for request in requests for frame in request.plan.frames}
    pictures = decode_pictures(requests[0].rgb, wanted, info.fps, key, to_rgb, (info.height, info.width))
    return [rgb_clip(request, [pictures[i] for i in request.plan.frames]) for request in requests]


def _flows_of(requests: Sequence[ClipRequest]) -> Sequence[torch.Tensor | None]:
    key, info = requests[0].key, requests[0].info
    if requests[0].flow is None:
        return [None] * len(requests)
    if info.flow_height is None or info.flow_width is None:
        raise DecodeError(key, "has a flow video, but its json gives no size for it")
    wanted = {frame for request in requests for frame in request.plan.flow_frames}
    size = (2 * info.flow_height, info.flow_width)
    planes = decode_pictures(requests[0].flow, wanted, info.fps, key, to_luma, size)
    return [flow_clip(request, [planes[i] for i in request.plan.flow_frames]) for request in requests]


def decode_pictures(
    data: bytes,
    wanted: set[int],
    fps: float,
    key: str,
    convert: Callable[[], Callable[[Any], Picture]],
    size: tuple[int, int],
) -> dict[int, Picture]:
    """Decode the wanted frames, and of their groups of pictures what stands before them.

    Args:
        wanted: frame indices.
        convert: makes a function from a frame to an array.
        size: height and width that the frames must have.

    Raises:
        DecodeError: the video is damaged, has not these frames, or another size.
    """
    pictures: dict[int, Picture] = {}
    picture_of = convert()
    try:
        for index, frame in _frames_for(data, wanted, fps):
            if (frame.height, frame.width) != size:
                raise DecodeError(key, f"is {frame.width}x{frame.height}, its json says {size[1]}x{size[0]}")
            if frame.is_corrupt:
                raise DecodeError(key, f"frame {index} is damaged")
            if index in wanted:
                pictures[index] = picture_of(frame)
                if len(pictures) == len(wanted):
                    return pictures
    except (av.error.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DecodeError(key, str(getattr(error, "strerror", None) or error)) from error
    raise DecodeError(key, f"has no frame {min(wanted - pictures.keys())}")


def _frames_for(data: bytes, wanted: set[int], fps: float) -> Iterator[tuple[int, Any]]:
    """Frames with their indices: the wanted ones, and those that have to be decoded before them."""
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        stream = video_stream(container)
        stream.thread_type = "NONE"
        tick = float(stream.time_base) * fps
        origin = stream.start_time or 0
        packets = (packet for _, packet in needed_packets(container, stream, wanted, fps))
        for packet in chain(packets, [None]):  # None: what the decoder holds back
            for frame in stream.codec_context.decode(packet):
                if frame.pts is None:
                    raise ValueError("a frame has no timestamp")
                yield round((frame.pts - origin) * tick), frame


def decode_only(request: ClipRequest) -> int:
    """Decode a clip's frames and drop them; the number of frames. The decoder's own speed, for `bench`."""

    def drop() -> Callable[[Any], Picture]:
        return lambda frame: nothing

    nothing = np.zeros(0, np.uint8)
    info, plan = request.info, request.plan
    videos = [
        (request.rgb, plan.frames, (info.height, info.width)),
        (request.flow, plan.flow_frames, (2 * (info.flow_height or 0), info.flow_width or 0)),
    ]
    return sum(
        len(decode_pictures(data, set(frames), info.fps, request.key, drop, size))
        for data, frames, size in videos
        if data is not None
    )


def to_rgb() -> Callable[[Any], Picture]:
    """A converter of decoded frames to uint8 [H, W, 3], for `decode_pictures`."""
    reformatter = VideoReformatter()

    def convert(frame: Any) -> Picture:
        converted = reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=Colorspace.ITU601,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=_CONVERSION,
            threads=1,
        )
        return np.asarray(converted.to_ndarray(), np.uint8)

    return convert


def to_luma() -> Callable[[Any], Picture]:
    """A converter of decoded frames to their luma codes, uint8 [H, W], for `decode_pictures`."""

    def convert(frame: Any) -> Picture:
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        picture: Picture = rows[: frame.height, : frame.width].copy()
        return picture

    return convert


def rgb_clip(request: ClipRequest, pictures: Sequence[Picture]) -> torch.Tensor:
    """A planned clip, uint8 [T, H, W, 3], of its whole frames, uint8 [h, w, 3]."""
    top, left, height, width = request.plan.crop
    cut = np.stack([picture[top : top + height, left : left + width] for picture in pictures])
    return _resize_and_flip(cut, request)


def flow_clip(request: ClipRequest, planes: Sequence[Picture]) -> torch.Tensor:
    """A planned clip, uint8 [T, H, W, 2], of its whole stacked planes, uint8 [2h, w].

    Both planes are cut out before the resize, so that they do not bleed into each other.
    """
    top, left, height, width = flow_crop(request.info, request.plan.crop)
    second = top + (request.info.flow_height or 0)
    columns = slice(left, left + width)
    cut = np.stack(
        [
            np.stack([plane[top : top + height, columns], plane[second : second + height, columns]], axis=-1)
            for plane in planes
        ]
    )
    return _resize_and_flip(cut, request)


def _resize_and_flip(clip: npt.NDArray[np.uint8], request: ClipRequest) -> torch.Tensor:
    """uint8 [T, h, w, C] to uint8 [T, H, W, C], bilinear with antialiasing."""
    frames = torch.from_numpy(clip).permute(0, 3, 1, 2)
    size = (request.shape.height, request.shape.width)
    if frames.shape[2:] != size:
        frames = torch.nn.functional.interpolate(frames, size=size, mode="bilinear", antialias=True)
    if request.plan.flip:
        frames = frames.flip(3)
    return frames.permute(0, 2, 3, 1).contiguous()
