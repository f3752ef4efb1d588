from __future__ import annotations

import contextlib
import io
import itertools
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import cast

import av
import numpy as np
import numpy.typing as npt
import pytest
from clips import moving, write_video
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dataloaders.errors import DecodeError
from dataloaders.video import (
    MINIMUM,
    Codec,
    VideoEncoder,
    VideoSource,
    decode_luma,
    flow_picture,
    flow_size,
    gray,
    inspect_video,
    stored_size,
)

CODECS: tuple[Codec, ...] = ("h264", "vp9")
# Every code as a flat patch of 16 x 16.
RAMP = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((16, 16), np.uint8))
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]], np.uint8)


def ramp_video(codec: Codec) -> bytes:
    encoder = VideoEncoder(codec, "flow", 256, 256, Fraction(25))
    for _ in range(13):
        encoder.add(flow_picture(RAMP))
    return encoder.finish()


def dali_rgb(data: bytes) -> npt.NDArray[np.uint8]:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> object:
        source = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)])
        return fn.decoders.video(source, device="cpu")

    pipe = pipeline()
    pipe.build()
    return np.array(pipe.run()[0].at(0))


def pictures_of(path: Path, width: int, height: int, fps: Fraction | None) -> list[npt.NDArray[np.uint8]]:
    with VideoSource(path) as source:
        return list(source.frames(width, height, fps))


def to_video(path: Path, codec: Codec, width: int, height: int) -> bytes:
    encoder = VideoEncoder(codec, "rgb", width, height, Fraction(25))
    for picture in pictures_of(path, width, height, Fraction(25)):
        encoder.add(picture)
    return encoder.finish()


def patches(colours: npt.NDArray[np.uint8], side: int = 64) -> npt.NDArray[np.uint8]:
    return np.repeat(np.repeat(colours.reshape(2, 3, 3), side, 0), side, 1)


def patch_centres(picture: npt.NDArray[np.uint8], side: int = 64) -> npt.NDArray[np.int64]:
    return picture[side // 2 :: side, side // 2 :: side].reshape(6, 3).astype(np.int64)


@pytest.mark.parametrize("codec", CODECS)
def test_all_256_flow_codes_survive_encoder_and_pyav(codec: Codec) -> None:
    data = ramp_video(codec)
    planes = list(decode_luma(data, "ramp"))
    assert len(planes) == 13
    assert all(np.array_equal(plane, RAMP) for plane in planes)
    assert inspect_video(data, "ramp").full_range


def test_all_256_flow_codes_survive_encoder_and_dali() -> None:
    decoded = dali_rgb(ramp_video("vp9"))
    assert decoded.shape == (13, 256, 256, 3)
    assert np.array_equal(decoded, np.broadcast_to(RAMP[None, :, :, None], decoded.shape))


@pytest.mark.parametrize("codec", CODECS)
def test_the_range_is_read_from_the_bitstream_and_not_from_the_container(codec: Codec) -> None:
    encoder = VideoEncoder(codec, "rgb", 128, 128, Fraction(25))
    encoder.add(np.full((192, 128), 128, np.uint8))
    limited = encoder.finish()
    at = limited.index(b"colrnclx") + len(b"colrnclx") + 6
    claimed = limited[:at] + b"\x80" + limited[at + 1 :]
    with av.open(io.BytesIO(claimed)) as container:
        assert container.streams.video[0].codec_context.color_range == 2
    assert not inspect_video(claimed, "claimed").full_range


@pytest.mark.parametrize("codec", CODECS)
def test_key_frames_stand_every_12_and_every_packet_is_one_frame(codec: Codec) -> None:
    encoder = VideoEncoder(codec, "rgb", 128, 128, Fraction(25))
    rng = np.random.default_rng(0)
    for _ in range(30):  # Noise, so that a scene-cut detector would fire.
        encoder.add(rng.integers(16, 236, (192, 128), dtype=np.uint8))
    with av.open(io.BytesIO(encoder.finish())) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [i for i, packet in enumerate(packets) if packet.is_keyframe] == [0, 12, 24]
        assert all(packet.pts == packet.dts for packet in packets)
        assert container.streams.video[0].average_rate == 25
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        container.seek(0)
        frames = list(container.decode(video=0))
    assert len(packets) == len(frames) == 30
    assert {frame.colorspace for frame in frames} <= {5, 6}
    assert {frame.color_range for frame in frames} == {1}


@pytest.mark.parametrize(
    ("name", "tags", "pix_fmt"),
    [
        ("untagged", None, "yuv420p"),
        ("709 limited", {"colorspace": 1, "color_range": 1}, "yuv420p"),
        ("709 full", {"colorspace": 1, "color_range": 2}, "yuv444p"),
        ("601 full", {"colorspace": 5, "color_range": 2}, "yuvj420p"),
    ],
)
def test_colours_stay_whatever_matrix_and_range_the_source_has(
    tmp_path: Path, name: str, tags: dict[str, int] | None, pix_fmt: str
) -> None:
    source = write_video(tmp_path / "s.mp4", [patches(COLOURS)] * 3, tags=tags, pix_fmt=pix_fmt)
    data = to_video(source, "vp9", 192, 128)
    with av.open(io.BytesIO(data)) as container:
        pyav = next(container.decode(video=0)).to_ndarray(format="rgb24")
    for decoded in (pyav, dali_rgb(data)[0]):
        assert np.abs(patch_centres(decoded) - COLOURS).max() <= 6


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_frames_give_the_same_bytes_whatever_lay_in_memory(tmp_path: Path, codec: Codec) -> None:
    rng = np.random.default_rng(1)
    width, height = (80, 64) if codec == "h264" else (160, 128)
    source = write_video(tmp_path / "s.mp4", moving(12, 64, 80, step=3, seed=10))
    pictures = pictures_of(source, width, height, None)
    made = set()
    for turn in range(24):
        junk = [rng.integers(0, 256, int(rng.integers(100, 200_000)), dtype=np.uint8) for _ in range(300)]
        del junk[:: 1 + turn % 2]
        encoder = VideoEncoder(codec, "rgb", width, height, Fraction(25))
        for picture in pictures:
            encoder.add(picture)
        made.add(encoder.finish())
    assert len(made) == 1


def show_by(source: Path, a: int, b: int, c: int, d: int) -> None:
    """Have a video shown at (a * x + c * y, b * x + d * y) of what is stored: QuickTime's matrix, in place."""
    data = source.read_bytes()
    one = 0x10000
    at = data.index(struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 0x40000000), data.index(b"tkhd"))
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
    source.write_bytes(data[:at] + matrix + data[at + 36 :])


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_metadata_is_applied(tmp_path: Path, turns: int) -> None:
    shown = patches(COLOURS)
    # The camera stores the picture turned and notes how to turn it back, counter-clockwise.
    source = write_video(tmp_path / "s.mp4", [np.rot90(shown, -turns)] * 3)
    show_by(source, *{0: (1, 0, 0, 1), 1: (0, -1, 1, 0), 2: (-1, 0, 0, -1), 3: (0, 1, -1, 0)}[turns])
    with VideoSource(source) as video:
        assert (video.width, video.height) == (192, 128)
    with av.open(io.BytesIO(to_video(source, "h264", 192, 128))) as container:
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(patch_centres(decoded) - COLOURS).max() <= 6


@pytest.mark.parametrize("sideways", [False, True])
@pytest.mark.parametrize(("x", "y"), [(1, -1), (-1, 1), (-1, -1)])
def test_mirrored_pictures_are_shown_as_the_file_says(tmp_path: Path, sideways: bool, x: int, y: int) -> None:
    shown = patches(COLOURS)
    stored = shown[::y, ::x]
    source = write_video(tmp_path / "s.mp4", [stored.transpose(1, 0, 2) if sideways else stored] * 3)
    show_by(source, *((0, y, x, 0) if sideways else (x, 0, 0, y)))
    with av.open(io.BytesIO(to_video(source, "h264", 192, 128))) as container:
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(patch_centres(decoded) - COLOURS).max() <= 6


def test_an_interlaced_picture_is_that_of_one_moment(tmp_path: Path) -> None:
    """Of a pattern that moves between its two fields, resized across them."""
    first, second = moving(2, 128, 128, step=10)
    woven = np.where((np.arange(128) % 2 == 0)[:, None, None], first, second)
    shown = []
    for number, (picture, flags) in enumerate(((woven, "+ilme+ildct"), (first, "0"), (second, "0"))):
        options = {"flags": flags, "b": "20000000"}
        source = write_video(tmp_path / f"{number}.ts", [picture] * 3, codec="mpeg2video", options=options)
        shown.append(gray(pictures_of(source, 96, 64, None)[1]).astype(int))
    assert np.abs(shown[0] - shown[1]).mean() < 0.2 * np.abs(shown[0] - shown[2]).mean()


def numbered(count: int) -> list[npt.NDArray[np.uint8]]:
    return [np.full((48, 64, 3), 5 * i, np.uint8) for i in range(count)]


def numbers_of(pictures: list[npt.NDArray[np.uint8]]) -> list[int]:
    return [round(float(gray(picture).mean()) / 5) for picture in pictures]


@pytest.mark.parametrize("name", ["12:30.mp4", "http:x.mp4", "a b%20c%03d.mp4", "ü#?.mp4"])
def test_a_file_s_name_is_no_address_and_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "plain.mp4", moving(3))
    monkeypatch.chdir(tmp_path)
    Path("plain.mp4").rename(name)
    with VideoSource(Path(name)) as source:
        assert source.width == 64


@pytest.mark.parametrize("threads", [1, 0])
def test_an_avi_with_b_frames_keeps_every_frame(tmp_path: Path, threads: int) -> None:
    """It holds no times: what stands for them follows the order of its packets, in HMDB51's files too."""
    source = write_video(tmp_path / "s.avi", numbered(40), options={"bf": "2"})
    with av.open(str(source)) as container:
        stamps = [frame.pts for frame in container.decode(video=0) if frame.pts is not None]
        assert stamps != sorted(stamps), "this file would not tell"
    with VideoSource(source, threads=threads) as video:
        assert numbers_of(list(video.frames(64, 48, Fraction(25)))) == list(range(40))


def test_real_avis_keep_every_frame(shared_videos: Path) -> None:
    """Steps of the stored frames: of 25 a second all, of 30 all but every sixth."""
    found = sorted(path for name in ("hmdb51", "ucf101") for path in (shared_videos / name).rglob("*.avi"))
    assert len(found) == 11
    for path in found:
        with VideoSource(path) as video:
            count = itertools.count()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(video, "_convert", lambda *_, count=count: next(count))
                numbers = cast("list[int]", list(video.frames(64, 48, Fraction(25))))
            steps = {b - a for a, b in pairwise(numbers)}
            assert steps == ({1} if video.fps == 25 else {1, 2}), path.name
            assert len(numbers) == pytest.approx(next(count) * 25 / video.fps, abs=1)


def test_a_clock_that_starts_again_loses_no_frame(tmp_path: Path) -> None:
    """Two broadcasts, one file behind the other."""
    data = write_video(tmp_path / "one.ts", numbered(40), codec="mpeg2video").read_bytes()
    (tmp_path / "two.ts").write_bytes(2 * data)
    shown = pictures_of(tmp_path / "two.ts", 64, 48, Fraction(25))
    assert numbers_of(shown) == [*range(40), *range(40)]


def test_a_source_at_the_wanted_rate_keeps_every_frame(tmp_path: Path) -> None:
    source = write_video(tmp_path / "s.mp4", numbered(40))
    assert numbers_of(pictures_of(source, 64, 48, Fraction(25))) == list(range(40))
    assert numbers_of(pictures_of(source, 64, 48, None)) == list(range(40))


def by_the_fps_filter(path: Path, fps: int) -> list[int]:
    """Numbers of the frames that FFmpeg's own filter gives."""
    shown: list[int] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream), graph.add("fps", f"fps={fps}"), graph.add("buffersink")]
        for one, other in pairwise(chain):
            one.link_to(other)
        graph.configure()
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
                while True:
                    shown.append(round(graph.pull().to_ndarray(format="rgb24").mean() / 5))
    return shown


@pytest.mark.parametrize("rate", [10, 24, Fraction(24000, 1001), 30, 48, 50, 59, 60, 100])
@pytest.mark.parametrize("count", [40, 41])
def test_the_rate_is_changed_as_by_ffmpeg(count: int, rate: Fraction | int, tmp_path: Path) -> None:
    """Of 50 frames a second every other one is halfway between two of 25: rounded to even, steps would be 1 and 3."""
    source = write_video(tmp_path / "s.mp4", numbered(count), rate=rate)
    expected = by_the_fps_filter(source, 25)
    assert numbers_of(pictures_of(source, 64, 48, Fraction(25))) == expected
    if rate == 50:
        assert expected[:20] == list(range(0, 40, 2))


def test_a_faster_source_loses_frames_and_a_slower_one_repeats_them(tmp_path: Path) -> None:
    fast = write_video(tmp_path / "fast.mp4", numbered(30), rate=30)
    kept = numbers_of(pictures_of(fast, 64, 48, Fraction(25)))
    assert kept == [i for i in range(30) if i % 6 != 3]
    slow = write_video(tmp_path / "slow.mp4", numbered(10), rate=Fraction(25, 2))
    assert numbers_of(pictures_of(slow, 64, 48, Fraction(25))) == [i for i in range(10) for _ in range(2)]
    with VideoSource(slow) as source:
        assert source.fps == Fraction(25, 2)
        assert len(list(source.frames(64, 48, None))) == 10


def test_a_variable_rate_becomes_constant_by_time(tmp_path: Path) -> None:
    times = [0, 40, 80, 400, 440, 441, 480]
    source = write_video(tmp_path / "s.mkv", numbered(7), times=times)
    shown = numbers_of(pictures_of(source, 64, 48, Fraction(25)))
    # Frame 2 stays for 8 slots, and of 4 and 5, which fall into one slot, the later one is taken.
    assert shown[:13] == [0, 1] + [2] * 8 + [3, 5, 6]


def test_timestamps_that_jump_are_an_error_and_no_endless_video(tmp_path: Path) -> None:
    source = write_video(tmp_path / "s.mkv", numbered(3), times=[0, 40, 3_600_000])
    with pytest.raises(DecodeError, match="timestamps jump by 3600 s"):
        pictures_of(source, 64, 48, Fraction(25))


@pytest.mark.parametrize(("width", "height"), [(63, 47), (321, 243), (97, 201)])
def test_odd_sizes_are_stored_in_multiples_of_16(tmp_path: Path, width: int, height: int) -> None:
    # mpeg4 codes odd sizes, which x264 refuses for 4:2:0.
    source = write_video(tmp_path / "s.avi", moving(5, height, width), codec="mpeg4")
    with VideoSource(source) as video:
        assert (video.width, video.height) == (width, height)
        size = stored_size(width, height, codec="h264", short_side=64, size=None)
        assert all(picture.shape == (size[1] * 3 // 2, size[0]) for picture in video.frames(*size, None))
    assert min(size) == 64 and size[0] % 16 == size[1] % 16 == 0


@pytest.mark.parametrize("codec", CODECS)
def test_stored_sizes_suit_nvdec(codec: Codec) -> None:
    least_width, least_height = MINIMUM[codec]
    for width, height in [(340, 256), (1920, 1080), (456, 256), (256, 456), (64, 64), (17, 400), (400, 17)]:
        for short_side in (16, 48, 112, 128, 256):
            size = stored_size(width, height, codec=codec, short_side=short_side, size=None)
            for scale in (0.5, 1.0):
                flow_width, flow_height = flow_size(*size, codec=codec, scale=scale)
                assert flow_width <= size[0] and flow_height <= size[1]
                for w, h in (size, (flow_width, 2 * flow_height)):
                    assert w % 16 == h % 16 == 0 and w >= least_width and h >= least_height
    assert stored_size(340, 256, codec=codec, short_side=256, size=None) == (336, 256)
    assert flow_size(352, 256, codec=codec, scale=0.5) == (176, 128)
    assert flow_size(336, 256, codec=codec, scale=1.0) == (336, 256)
    assert stored_size(340, 256, codec=codec, short_side=None, size=(352, 256)) == (352, 256)


@pytest.mark.parametrize("content", ["text", "empty", "cut", "sound"])
def test_p8_a_file_that_is_no_video_is_refused_with_a_reason(tmp_path: Path, content: str) -> None:
    file = tmp_path / "s.mp4"
    if content == "sound":
        with av.open(str(file), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif content == "cut":
        file.write_bytes(write_video(tmp_path / "whole.mp4", moving()).read_bytes()[:900])
    else:
        file.write_bytes(b"this is a text\n" * 100 if content == "text" else b"")
    reasons = {"sound": "holds no video stream", "empty": "the file is empty"}
    reason = reasons.get(content, "it is no video, or was cut off")
    with pytest.raises(DecodeError, match=rf"s\.mp4: {reason}$"):
        pictures_of(file, 64, 64, Fraction(25))


@pytest.mark.parametrize("fps", [None, Fraction(25)])
def test_p8_an_avi_that_was_cut_off_is_refused(tmp_path: Path, fps: Fraction | None) -> None:
    whole = write_video(tmp_path / "whole.avi", moving(40), codec="mpeg4")
    data = whole.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    with pytest.raises(DecodeError, match=r"cut\.avi: ends after \d\d of 40 frames: it was cut off"):
        pictures_of(tmp_path / "cut.avi", 64, 64, fps)
    assert len(pictures_of(whole, 64, 64, fps)) == 40


@pytest.mark.parametrize("name", ["s.mp4", "s.mkv", "s.webm", "s.mov"])
def test_p8_other_files_that_were_cut_off_are_refused(tmp_path: Path, name: str) -> None:
    """Those that say how long they are before their pictures, as what is put into the web does."""
    codec = {"s.webm": "libvpx-vp9", "s.mov": "mpeg4"}.get(name, "libx264")
    start = {"movflags": "faststart"} if name in ("s.mp4", "s.mov") else {}
    whole = write_video(tmp_path / name, moving(60, 128, 128), codec=codec, container_options=start)
    assert len(pictures_of(whole, 64, 64, None)) == 60
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(DecodeError, match=r"ends after \d\.\d of 2\.4 s: it was cut off|Invalid data"):
        pictures_of(whole, 64, 64, None)


def write_with_sound(path: Path, *, seconds: int, video_from: int, sound: str) -> Path:
    """Noise for so many seconds, and video of 25 frames a second that begins later and ends with it."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=25)
        video.width = video.height = 128
        noise = container.add_stream(sound, rate=48000, layout="mono")
        draw = np.random.default_rng(0)
        for second in range(seconds):
            samples = draw.integers(-9999, 9999, (1, 48000), dtype=np.int16)
            heard = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            heard.rate, heard.pts, heard.time_base = 48000, second * 48000, Fraction(1, 48000)
            for piece in av.AudioResampler(noise.format, "mono", 48000, frame_size=noise.frame_size).resample(heard):
                container.mux(noise.encode(piece))
            for number, picture in enumerate(moving(25, 128, 128) if second >= video_from else ()):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = second * 25 + number, Fraction(1, 25)
                container.mux(video.encode(frame))
        for stream in (video, noise):
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name, sound", [("s.mkv", "pcm_s16le"), ("s.webm", "libopus"), ("s.mp4", "aac")])
def test_a_video_that_begins_after_its_sound_is_whole(tmp_path: Path, name: str, sound: str) -> None:
    """As `ffmpeg -ss ... -c copy` leaves it."""
    assert len(pictures_of(write_with_sound(tmp_path / name, seconds=4, video_from=2, sound=sound), 64, 64, None)) == 50


def test_p8_a_file_whose_sound_is_cut_off_too_is_refused(tmp_path: Path) -> None:
    """Of a writer that says how long the whole file is, not each stream."""
    file = write_with_sound(tmp_path / "s.mkv", seconds=4, video_from=0, sound="pcm_s16le")
    data = file.read_bytes().replace(b"DURATION", b"DURATIVE")
    file.write_bytes(data)
    assert len(pictures_of(file, 64, 64, None)) == 100
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DecodeError, match=r"ends after [12]\.\d of 4\.0 s: it was cut off|Invalid data"):
        pictures_of(file, 64, 64, None)


def test_a_recording_that_begins_between_two_key_frames_is_whole(tmp_path: Path) -> None:
    file = write_video(tmp_path / "s.ts", moving(100), options={"g": "50", "keyint_min": "50", "bf": "0"})
    data = file.read_bytes()
    with av.open(str(file)) as container:
        (tenth,) = [packet.pos for i, packet in enumerate(container.demux(video=0)) if i == 10]
    file.write_bytes(data[tenth // 188 * 188 :])
    assert len(pictures_of(file, 64, 64, None)) == 50


def test_a_guess_of_hundreds_of_frames_a_second_is_not_believed(tmp_path: Path) -> None:
    """Browsers record so: no rate in the file, and pictures when they come."""
    times = [33 * i + (i * 7) % 5 for i in range(60)]
    file = write_video(
        tmp_path / "s.webm", moving(60, 128, 128), codec="libvpx", times=times, container_options={"live": "1"}
    )
    data = bytearray(file.read_bytes())
    rate = data.index(b"\x23\xe3\x83")  # DefaultDuration, and the size of its number: void now
    data[rate : rate + 2] = bytes([0xEC, 0x80 | (2 + (data[rate + 3] & 0x7F))])
    file.write_bytes(data)
    with av.open(str(file)) as container:
        assert container.streams.video[0].guessed_rate >= 200  # of 30 pictures a second
    with VideoSource(file) as source:
        assert source.fps == 25


def test_p8_a_file_of_which_much_is_damaged_is_refused(tmp_path: Path) -> None:
    """Decoders make pictures of damage, and mark them."""
    source = write_video(tmp_path / "s.mkv", moving(60, 128, 128), codec="mpeg4")
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets[10:20]:
        data[position + size // 2 : position + size] = bytes(size - size // 2)
    source.write_bytes(data)
    with pytest.raises(DecodeError, match=r"\d+ of its \d+ frames are damaged"):
        pictures_of(source, 64, 64, None)


def test_p8_a_picture_on_the_cover_is_no_video(tmp_path: Path) -> None:
    file = tmp_path / "s.mp3"
    tag = b"APIC" + struct.pack(">I", 13 + len(cover := png())) + b"\0\0\0image/png\0\3\0" + cover
    size = len(tag)
    header = b"ID3\3\0\0" + bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
    with av.open(str(tmp_path / "plain.mp3"), "w", format="mp3", options={"id3v2_version": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file.write_bytes(header + tag + (tmp_path / "plain.mp3").read_bytes())
    with av.open(str(file)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(DecodeError, match=r"s\.mp3: holds no video stream"):
        pictures_of(file, 64, 64, None)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "png")
    return file.getvalue()


def test_frames_that_a_whole_file_counts_and_does_not_show_are_not_missed(tmp_path: Path) -> None:
    """Repeated frames of an AVI are numbers without data, and an MP4's edit list leaves out what it begins before."""
    times = [1000 * frame // 25 for frame in range(60) if frame % 3 == 0]
    gaps = write_video(tmp_path / "gaps.avi", moving(20), codec="mpeg4", times=times)
    with av.open(str(gaps)) as container:
        assert container.streams.video[0].frames > 50
    assert len(pictures_of(gaps, 64, 64, None)) == 20
    write_video(tmp_path / "long.mp4", moving(40))
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(tmp_path / "long.mp4")) as source, av.open(str(tmp_path / "end.mp4"), "w", options=options) as end:
        copy = end.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (stamp - int(1 / packet.time_base) for stamp in (packet.pts, packet.dts))
                packet.stream = copy
                end.mux(packet)
    with av.open(str(tmp_path / "end.mp4")) as container:
        assert container.streams.video[0].frames == 40
    assert len(pictures_of(tmp_path / "end.mp4", 64, 64, None)) == 15


def test_real_clips_of_every_make_are_read(shared_videos: Path) -> None:
    files = [f for s in ("ucf101", "hmdb51", "kinetics400") for f in (shared_videos / s).rglob("*") if f.is_file()]
    files = [f for f in files if f.suffix in (".avi", ".mp4")]
    assert files
    for file in files:
        with VideoSource(file) as source:
            size = stored_size(source.width, source.height, codec="h264", short_side=48, size=None)
            count = sum(1 for _ in source.frames(*size, source.fps))
        with av.open(str(file), metadata_errors="ignore") as container:
            decoded = sum(1 for _ in container.decode(video=0))
        assert abs(count - decoded) <= 1, file.name
