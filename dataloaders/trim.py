"""The part of a stored video that has to be decoded for some frames: groups of pictures, up to the last one wanted.

DALI 2.4 on a CPU decodes an in-memory video from its first frame on, wherever the clip begins (measured: frame 0 takes
5 ms, frame 96, a key frame, 66 ms). What is not there is not decoded, and need not go to a GPU either. Of frames from
all over the video (segments) most lie between those that are wanted: PyAV leaves them out in the same way.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

import av
import av.error

from dataloaders.errors import DecodeError
from dataloaders.video import video_stream

_WORTHWHILE = 12
"""Fewer frames than this in a row cost less to decode than to cut out."""


def needed_packets(container: Any, stream: Any, wanted: Collection[int], fps: float) -> Iterator[tuple[int, Any]]:
    """Packets to decode for the wanted frames, with their frames' indices: of each group of pictures the part up to its
    last wanted frame.

    The video has a constant frame rate and no B frames, as preparation makes them.

    Raises:
        ValueError: the wanted frames of a group do not begin with a key frame.
    """
    tick = float(stream.time_base) * fps
    origin = stream.start_time or 0
    first, last = min(wanted), max(wanted)
    if first > 0:
        # Half a frame later than the wanted one: rounding must not reach back to the key frame before.
        container.seek(origin + int((first + 0.5) / tick), stream=stream, backward=True)
    group: list[tuple[int, Any]] = []
    for packet in container.demux(stream):
        if packet.pts is None:
            break
        index = round((packet.pts - origin) * tick)
        if packet.is_keyframe:
            yield from _up_to_the_last(group, wanted)
            group = []
        if index > last:
            break
        group.append((index, packet))
    yield from _up_to_the_last(group, wanted)


def _up_to_the_last(group: Sequence[tuple[int, Any]], wanted: Collection[int]) -> Iterator[tuple[int, Any]]:
    last = max((index for index, _ in group if index in wanted), default=None)
    if last is None:
        return
    if not group[0][1].is_keyframe:
        raise ValueError(f"has no key frame before frame {last}")
    yield from (entry for entry in group if entry[0] <= last)


def trim(data: bytes, frames: Sequence[int], fps: float, key: str) -> tuple[bytes, tuple[int, ...]]:
    """The part of a video that has to be decoded for `frames`, and the frames' indices in that part.

    Raises:
        DecodeError: the container is damaged, or lacks a frame.
    """
    wanted = set(frames)
    if max(after - before for before, after in pairwise([0, *sorted(wanted)])) < _WORTHWHILE:
        return data, tuple(frames)
    try:
        part, places = _cut(data, wanted, fps)
        return part, tuple(places[frame] for frame in frames)
    except KeyError as error:
        raise DecodeError(key, f"has no frame {error.args[0]}") from error
    except (av.error.FFmpegError, ValueError, IndexError, TypeError) as error:
        raise DecodeError(key, str(getattr(error, "strerror", None) or error)) from error


def _cut(data: bytes, wanted: Collection[int], fps: float) -> tuple[bytes, dict[int, int]]:
    """The needed packets as a video of their own, and the place of each frame in it."""
    buffer = io.BytesIO()
    places: dict[int, int] = {}
    with av.open(io.BytesIO(data), metadata_errors="ignore") as source:
        stream = video_stream(source)
        ticks = 1 / (float(stream.time_base) * fps)
        with av.open(buffer, "w", format="mp4") as target:
            copy = target.add_stream_from_template(stream)
            for index, packet in needed_packets(source, stream, wanted, fps):
                packet.pts = packet.dts = round(len(places) * ticks)
                places[index] = len(places)
                packet.stream = copy
                target.mux(packet)
            if not places:
                raise ValueError(f"has no frame {min(wanted)}")
    return buffer.getvalue(), places
