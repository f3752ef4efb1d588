"""Reading source videos of any make, and writing the videos that shards hold (PyAV, with its own FFmpeg).

A frame between the two is an `I420` array: uint8 [H * 3 / 2, W], the planes Y, U, V of a yuv420p picture one
after the other, BT.601 limited range (flow: full range, chroma 128).
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from dataloaders.errors import DecodeError

I420 = npt.NDArray[np.uint8]
Codec = Literal["h264", "vp9"]
Content = Literal["rgb", "flow"]

KEYFRAME_INTERVAL = 12
BLOCK = 16
"""Of widths and heights: then NVDEC's coded size is its display size, and it reuses decoders."""

MINIMUM: dict[Codec, tuple[int, int]] = {"h264": (48, 16), "vp9": (128, 128)}
"""Smallest width and height that NVDEC decodes, from NVIDIA's table of limits."""

MAX_GAP_SECONDS = 60.0
"""A larger step between two timestamps is damage: filling it with copies would take for ever."""

_FASTEST_GUESS = 120
"""Frames a second; a higher rate is believed where the file counts it, not where FFmpeg guesses."""

RESET_SECONDS = 1.0
"""A larger step back between two timestamps is a clock that starts again, as where two files were joined."""

_WHOLE = 0.9
"""Share of a file's frames, or of its duration, that must come, and be whole: an AVI's header may count some that no
decoder gives, as HMDB51's do by one, and the first ones of a broadcast may lack what they refer to."""

_SMPTE170M = 6
"""H.273's number of BT.601 (525 lines) as matrix, primaries and transfer curve."""

_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

_ENCODERS: dict[Codec, str] = {"h264": "libx264", "vp9": "libvpx-vp9"}


def _has_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "avx512" in cpuinfo.read_text()


# The AVX-512 code of x264's macroblock tree reads memory it never wrote when the picture is narrow (80 pixels):
# the same frames then give other bytes from one call to the next. Its AVX2 code and its C code agree.
_X264 = {"preset": "medium", "sc_threshold": "0", "bf": "0"} | ({"x264-params": "asm=avx2"} if _has_avx512() else {})
# No look-ahead and no alternative reference: every packet is one shown frame, so counts and seeks are exact.
_VPX = {"row-mt": "1", "lag-in-frames": "0", "auto-alt-ref": "0", "b": "0"}
_OPTIONS: dict[tuple[Codec, Content], dict[str, str]] = {
    ("h264", "rgb"): _X264,
    ("h264", "flow"): _X264,
    ("vp9", "rgb"): {**_VPX, "deadline": "realtime", "cpu-used": "7"},
    # Real-time settings are three times as fast but lose codes even of a still picture.
    ("vp9", "flow"): {**_VPX, "deadline": "good", "cpu-used": "5"},
}
_QUALITY: dict[tuple[Codec, Content], int] = {
    ("h264", "rgb"): 23,
    ("h264", "flow"): 16,
    ("vp9", "rgb"): 30,
    ("vp9", "flow"): 12,
}

_GRAY_OF_LUMA: npt.NDArray[np.uint8] = np.clip(
    np.rint((np.arange(256, dtype=np.float64) - 16) * (255 / 219)), 0, 255
).astype(np.uint8)


def video_stream(container: Any) -> Any:
    """The first video stream of what PyAV has opened, which a picture on the cover of a sound file is not.

    Raises:
        ValueError: there is none that FFmpeg has a decoder for.
    """
    cover = Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
    if stream is None:
        raise ValueError("holds no video stream")
    if stream.codec_context is None:
        raise ValueError("its video is encrypted, or in a codec that FFmpeg does not know")
    return stream


def _nearest(value: Fraction) -> int:
    # Exact, and halves upwards: of 50 frames a second every other one lies halfway between two of 25, and rounded to
    # the even one they would go by steps of one and three frames.
    return math.floor(value + Fraction(1, 2))


@dataclass(frozen=True, slots=True)
class _Orientation:
    """How a stored picture is to be shown: its axes exchanged first, then mirrored."""

    sideways: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def of(cls, frame: Any) -> _Orientation:
        """As the file's display matrix says; of other turns than by 90 degrees the nearest, as players do."""
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
        if matrix is None:
            return cls()
        x_of_x, y_of_x, _, x_of_y, y_of_y = struct.unpack("=5i", bytes(matrix)[:20])
        if abs(y_of_x) > abs(x_of_x):
            return cls(sideways=True, mirror_x=x_of_y < 0, mirror_y=y_of_x < 0)
        return cls(mirror_x=x_of_x < 0, mirror_y=y_of_y < 0)

    def show(self, picture: I420) -> I420:
        """The picture turned and mirrored."""
        if self == _Orientation():
            return picture
        height, width = picture.shape[0] * 2 // 3, picture.shape[1]
        chroma = picture[height:].reshape(2, height // 2, width // 2)
        planes = [plane.T if self.sideways else plane for plane in (picture[:height], chroma[0], chroma[1])]
        planes = [plane[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1] for plane in planes]
        luma = planes[0]
        return np.concatenate([luma, *(plane.reshape(-1, luma.shape[1]) for plane in planes[1:])])


class _OneField:
    """Of an interlaced picture, whose two halves are of two moments, the lines of the first."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._form: tuple[int, int, str] | None = None

    def __call__(self, frame: Any) -> Any:
        form = (frame.width, frame.height, frame.format.name)
        if form != self._form:
            self._graph, self._form = av.filter.Graph(), form
            width, height, pixels = form
            source = self._graph.add_buffer(width=width, height=height, format=pixels, time_base=frame.time_base)
            field, sink = self._graph.add("field", "type=top"), self._graph.add("buffersink")
            source.link_to(field)
            field.link_to(sink)
            self._graph.configure()
        self._graph.push(frame)
        return self._graph.pull()


class VideoSource:
    """A source video, opened and decoded up to its first frame.

    Args:
        threads: that decode; 0 = one for each core. The frames are the same.

    Attributes:
        width, height: as displayed, after rotation and the pixels' aspect ratio.
        fps: average frame rate.
        seconds: duration, as far as the file knows it; None where it does not.

    Raises:
        DecodeError: on construction and while reading, for whatever the decoder refuses; at its end for a file that
            was cut off, as far as it says how long it is, and for one of which much is damaged.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._path = path
        self._threads = threads
        try:
            # Some HMDB51 files hold metadata that is not UTF-8. Without `file:` a name like 12:30.mp4 is an address.
            self._container = av.open(f"file:{path}", metadata_errors="ignore")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DecodeError(str(path), _unopened(path, error)) from error
        try:
            self._start()
        except BaseException:
            self._container.close()
            raise

    def _start(self) -> None:
        try:
            stream = video_stream(self._container)
        except ValueError as error:
            raise DecodeError(str(self._path), str(error)) from None
        stream.thread_type = "NONE" if self._threads == 1 else "AUTO"
        stream.codec_context.thread_count = self._threads
        guess = stream.guessed_rate or 0
        # Of a recording whose pictures come when they like, the guess is the clock's rate: 1000.
        rate = stream.average_rate or (guess if guess <= _FASTEST_GUESS else None)
        self.fps = Fraction(rate) if rate else Fraction(25)
        known = self._container.duration
        self.seconds = None if known is None else known / av.time_base
        self._avi = self._container.format.name == "avi"
        self._others_end = Fraction(0)
        self._decoded = self._decode(stream)
        first = next(self._decoded, None)
        if first is None:
            raise DecodeError(str(self._path), "holds no frame")
        self._first = first
        self._orientation = _Orientation.of(first)
        self._one_field = _OneField()
        aspect = float(stream.sample_aspect_ratio or 1)
        width = round(first.width * aspect) if 0.25 <= aspect <= 4 else first.width
        self.width, self.height = (first.height, width) if self._orientation.sideways else (width, first.height)

    def _stamp(self, frame: Any) -> int | None:
        # An AVI holds no times: those of its pictures are made up in the order of its packets, which is another one
        # where there are B-frames (HMDB51). The decoder's own are in order, and without B-frames the same.
        return frame.dts if self._avi else frame.pts  # type: ignore[no-any-return]

    def _frames_of(self, stream: Any) -> Iterator[Any]:
        """The stream's frames; notes how far the other streams go."""
        for packet in self._container.demux():
            if packet.stream.index == stream.index:
                yield from packet.decode()
            elif packet.pts is not None:
                ends = (packet.pts + (packet.duration or 0)) * packet.time_base
                self._others_end = max(self._others_end, ends)

    def _decode(self, stream: Any) -> Iterator[Any]:
        count = damaged = number = 0
        begin = end = None
        try:
            for frame in self._frames_of(stream):
                yield frame
                count += 1
                damaged += frame.is_corrupt
                stamp = self._stamp(frame)
                # An AVI's timestamps are numbers of frames. Repeated ones, which are not stored, are counted there.
                number = max(number, stamp or 0) + 1
                if stamp is not None:
                    begin = stamp if begin is None else begin
                    end = max(end or stamp, stamp + (frame.duration or 0))
        except (av.error.FFmpegError, ValueError) as error:
            raise DecodeError(str(self._path), _reason(error)) from error
        if damaged > (1 - _WHOLE) * count:
            raise DecodeError(str(self._path), f"{damaged} of its {count} frames are damaged")
        # FFmpeg says nothing of a file that was cut off. An MP4's number of frames says nothing either: it counts what
        # an edit list leaves out, which its duration does not.
        if self._avi and 0 < number < _WHOLE * stream.frames:
            raise DecodeError(str(self._path), f"ends after {number} of {stream.frames} frames: it was cut off")
        if not self._avi and begin is not None and end is not None:
            last = end * stream.time_base + 1 / self.fps  # the last frame may have no duration
            came, known = _reached(self._container, stream, begin * stream.time_base, last, self._others_end)
            if came < _WHOLE * known:
                raise DecodeError(str(self._path), f"ends after {came:.1f} of {known:.1f} s: it was cut off")

    def frames(self, width: int, height: int, fps: Fraction | None) -> Iterator[I420]:
        """All frames at the given size, once; at `fps` by repeating and dropping, or as they are (None).

        A frame with timestamp p belongs to the output frame nearest to p * fps, halves upwards; an output frame that
        gets none repeats the one before, of several the last is taken (as FFmpeg's `fps` filter does).
        """
        if fps is None:
            for frame in self._with_first():
                yield self._convert(frame, width, height)
            return
        slot = -1
        held: I420 | None = None
        time = Fraction(0)
        for frame, time in self._timed():
            new_slot = max(slot, _nearest(time * fps))
            if held is not None:
                for _ in range(new_slot - slot):
                    yield held
            held, slot = self._convert(frame, width, height), new_slot
        assert held is not None, "the first frame is always there"
        end = _nearest((time + 1 / self.fps) * fps)
        for _ in range(max(end - slot, slot == 0)):  # the last may come where no slot is left; the first is shown
            yield held

    def _timed(self) -> Iterator[tuple[Any, Fraction]]:
        """Each frame and its time in seconds from the first one's, which never runs backwards."""
        period = 1 / self.fps
        begin, last = (self._stamp(self._first) or 0) * self._first.time_base, -period
        for frame in self._with_first():
            stamp = self._stamp(frame)
            following = last + period
            time = following if stamp is None else stamp * frame.time_base - begin
            if time < last - RESET_SECONDS:
                begin += time - following
                time = following
            if time - last > MAX_GAP_SECONDS:
                raise DecodeError(str(self._path), f"timestamps jump by {float(time - last):.0f} s")
            last = max(time, last)
            yield frame, last

    def _with_first(self) -> Iterator[Any]:
        yield self._first
        yield from self._decoded

    def _convert(self, frame: Any, width: int, height: int) -> I420:
        sideways = self._orientation.sideways
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        matrix = _matrix(frame.colorspace)
        if frame.interlaced_frame:
            frame = self._one_field(frame)
        converted = frame.reformat(
            width=height if sideways else width,
            height=width if sideways else height,
            format="yuv420p",
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALING,
            threads=1,
        )
        return self._orientation.show(converted.to_ndarray())

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tag(coded: Any, *, full_range: bool = False) -> None:
    """Say of a picture, or of a codec context for pictures, that it is BT.601."""
    coded.color_range = int(ColorRange.JPEG if full_range else ColorRange.MPEG)
    coded.colorspace = coded.color_primaries = coded.color_trc = _SMPTE170M


class VideoEncoder:
    """Encodes I420 frames into an mp4 in memory: key frame every 12, no B-frames, one thread, tagged BT.601.

    RGB content is tagged limited range. Flow content is tagged full range, in the bitstream itself (H.264
    VUI, VP9 header), and encoded at near-lossless quality.
    """

    def __init__(self, codec: Codec, content: Content, width: int, height: int, fps: Fraction) -> None:
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        options = {
            "crf": str(_QUALITY[codec, content]),
            "g": str(KEYFRAME_INTERVAL),
            "keyint_min": str(KEYFRAME_INTERVAL),
            **_OPTIONS[codec, content],
        }
        self._stream = self._container.add_stream(_ENCODERS[codec], rate=fps, options=options)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._full_range = content == "flow"
        context = self._stream.codec_context
        context.thread_count = 1
        tag(context, full_range=self._full_range)
        self._time_base = 1 / fps
        self.count = 0

    def add(self, picture: I420) -> None:
        """Encode one frame, uint8 [H * 3 / 2, W]."""
        frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
        tag(frame, full_range=self._full_range)
        frame.pts, frame.time_base = self.count, self._time_base
        self._container.mux(self._stream.encode(frame))
        self.count += 1

    def finish(self) -> bytes:
        """The whole file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVideo:
    """What a stored video says about itself; `full_range` and `codec` are read from the bitstream."""

    codec: str
    width: int
    height: int
    num_frames: int
    full_range: bool


def inspect_video(data: bytes, key: str) -> StoredVideo:
    """Read a stored video's properties; decodes its first frame only.

    The range is read by a decoder that never saw the container, because NVDEC believes the bitstream alone.

    Raises:
        DecodeError: the video cannot be read.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = video_stream(container)
            codec = stream.codec_context.name
            decoder = av.CodecContext.create(codec, "r")
            decoder.extradata = stream.codec_context.extradata
            decoder.thread_count = 1
            frames: list[Any] = []
            for packet in container.demux(stream):
                frames += decoder.decode(packet if packet.size else None)
                if frames:
                    break
            return StoredVideo(
                codec=codec,
                width=frames[0].width,
                height=frames[0].height,
                num_frames=stream.frames,
                full_range=frames[0].color_range == ColorRange.JPEG,
            )
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise DecodeError(key, _reason(error)) from error


def decode_luma(data: bytes, key: str) -> Iterator[npt.NDArray[np.uint8]]:
    """The luma planes of a stored video, uint8 [H, W] each, exactly as coded; DecodeError where damaged."""
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = video_stream(container)
            stream.thread_type = "NONE"
            for frame in container.decode(stream):
                plane = frame.planes[0]
                rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
                yield rows[: frame.height, : frame.width].copy()
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise DecodeError(key, _reason(error)) from error


def gray(picture: I420) -> npt.NDArray[np.uint8]:
    """The gray picture of an I420 frame, uint8 [H, W], black 0 and white 255."""
    return _GRAY_OF_LUMA[picture[: picture.shape[0] * 2 // 3]]


def flow_picture(codes: npt.NDArray[np.uint8]) -> I420:
    """The I420 frame of one stacked flow plane, uint8 [2h, w]; chroma is 128, so that R = G = B = code."""
    height, width = codes.shape
    return np.concatenate([codes, np.full((height // 2, width), 128, np.uint8)])


def stored_size(
    width: int, height: int, *, codec: Codec, short_side: int | None, size: tuple[int, int] | None
) -> tuple[int, int]:
    """Width and height at which a source of the given displayed size is stored.

    Either `size` as it is, or the short side brought to `short_side` and the long side to the multiple of 16
    nearest to the aspect ratio. Below the codec's minimum the picture is scaled up to it.
    """
    if size is not None:
        return size
    assert short_side is not None
    scale = short_side / min(width, height)
    least = MINIMUM[codec]
    scale = max(scale, least[0] / width, least[1] / height)
    return _to_block(width * scale), _to_block(height * scale)


def flow_size(width: int, height: int, *, codec: Codec, scale: float) -> tuple[int, int]:
    """Width and height of one flow plane beside an RGB video of the given size.

    The video holds two planes on top of each other, so the height is a multiple of 8. The width goes to the
    nearest multiple of 16 (half up), so the two scales may differ a little: readers take them from the
    sizes. Both respect the codec's minimum.
    """
    least_width, least_height = MINIMUM[codec]
    flow_width = max(_to_block(width * scale), least_width)
    flow_height = max(_to_block(2 * height * scale), least_height) // 2
    return min(flow_width, width), min(flow_height, height)


def _to_block(length: float) -> int:
    return max(1, int(length / BLOCK + 0.5)) * BLOCK


def _reached(container: Any, stream: Any, begin: Fraction, end: Fraction, others: Fraction) -> tuple[float, float]:
    """How far a file's video went and how far it was to go by what the file says, in seconds; 0 where it says nothing.

    Args:
        begin, end: of the frames that came.
        others: the end of the other streams.
    """
    if stream.duration is not None:
        # What a recording from the air holds before its first key frame is counted, and gives no frame.
        start = begin if stream.start_time is None else min(begin, stream.start_time * stream.time_base)
        return float(end - start), float(stream.duration * stream.time_base)
    start = min(begin, Fraction(0))
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")  # Matroska, 00:00:02.400000000
    minutes, _, seconds = rest.partition(":")
    with contextlib.suppress(ValueError):
        # When it ends, whenever it begins; of some writers how long it is, which is not more.
        return float(end - start), 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    # Of the stream that ends last, which may be the sound.
    return float(max(end, others) - start), (container.duration or 0) / av.time_base


def _matrix(colorspace: int) -> Colorspace:
    # Untagged video is taken for BT.601 whatever its size, as swscale and DALI do.
    known = {1: Colorspace.ITU709, 4: Colorspace.FCC, 7: Colorspace.SMPTE240M}
    known.update(dict.fromkeys((9, 10), Colorspace.BT2020))
    return known.get(colorspace, Colorspace.ITU601)


def _unopened(path: Path, error: BaseException) -> str:
    if isinstance(error, av.error.InvalidDataError):
        return "it is no video, or was cut off" if path.stat().st_size else "the file is empty"
    return "holds no frame" if isinstance(error, av.error.EOFError) else _reason(error)


def _reason(error: BaseException) -> str:
    # FFmpeg's errors repeat the file's path after the message.
    strerror = getattr(error, "strerror", None)
    return str(strerror or error) or type(error).__name__
