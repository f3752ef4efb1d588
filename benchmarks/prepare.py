"""Preparation of real clips: speed, where the time goes, bytes and error of the stored flow, memory.

    python benchmarks/prepare.py --write benchmarks/prepare.md      (needs ../shared/videos; 30 minutes on 2 cores)

The clips are those of skateboard, a folder per class; tables of a part take every n-th file in order of their names.
Bytes and errors are also those of all clips of ucf101, hmdb51 and kinetics400.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import av
import cv2
import numpy as np
from machine import cpu_facts, page_parser, publish

from dataloaders import prepare, transcode
from dataloaders.flow import BOUND, decode_flow, encode_flow, tvl1
from dataloaders.shards import DataSet, SampleInfo, ShardReader
from dataloaders.sources import SourceClip, SourceListing, read_folder
from dataloaders.transcode import PrepareSettings
from dataloaders.video import Codec, VideoEncoder, VideoSource, decode_luma, gray, stored_size

SHARED = Path(__file__).resolve().parents[2] / "shared" / "videos"
VIDEOS, OTHERS = SHARED / "skateboard", ("ucf101", "hmdb51", "kinetics400")
STAGES_EVERY, BYTES_EVERY = 10, 20
FPS = Fraction(25)
JPEG_QUALITY = 95
"""OpenCV's default, which is that of the field's extractors."""
FORMS: tuple[tuple[Codec, float], ...] = (("h264", 0.5), ("h264", 1.0), ("vp9", 0.5))
"""Codec and size of the flow beside the RGB; the first is the default."""
MINUTES = (1, 10)


def command(*words: object) -> subprocess.Popen[str]:
    """`rev2net prepare` in a process of its own."""
    line = [sys.executable, "-m", "rev2net", "prepare", *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def every(listing: SourceListing, step: int) -> list[SourceClip]:
    """Every `step`-th clip in order of the names."""
    return sorted(listing.clips, key=lambda clip: clip.relative)[::step]


def whole(folder: Path, workers: int) -> tuple[float, int, int]:
    """Seconds, clips and frames of the whole preparation with its default settings."""
    start = time.perf_counter()
    process = command("folder", VIDEOS, folder, "--workers", workers)
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error)
    seconds = time.perf_counter() - start
    data, clips, frames = DataSet.open(folder), 0, 0
    for split in data.splits:
        for shard in data.shards(split):
            with ShardReader(shard.path) as reader:
                clips += len(reader)
                for i in range(len(reader)):
                    frames += SampleInfo.from_json("", reader.read(i, ("json",))["json"]).num_frames
    return seconds, clips, frames


@contextmanager
def clocks(taken: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside the stages' own functions, which stay as they are."""

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                taken[stage] = taken.get(stage, 0.0) + time.perf_counter() - start

        return call

    def frames(self: VideoSource, *args: Any) -> Iterator[Any]:
        pictures = original(self, *args)
        following = timed("decode, scale", lambda: next(pictures, None))
        while (picture := following()) is not None:
            yield picture

    original = VideoSource.frames
    with ExitStack() as stack:
        for target, name, stage in (
            (VideoSource, "__init__", "decode, scale"),
            (transcode, "_estimate", "TV-L1"),
            (VideoEncoder, "add", "encode"),
            (VideoEncoder, "finish", "encode"),
            (prepare, "write_atomically", "write samples"),
            (prepare, "_pack", "write shards"),
        ):
            stack.enter_context(mock.patch.object(target, name, timed(stage, getattr(target, name))))
        stack.enter_context(mock.patch.object(VideoSource, "frames", frames))
        yield


def stages(clips: Sequence[SourceClip], classes: Sequence[str], folder: Path) -> dict[str, float]:
    """Seconds of each stage in one process."""
    taken: dict[str, float] = {}
    listing = SourceListing(classes=tuple(classes), clips=tuple(clips))
    start = time.perf_counter()
    with clocks(taken):
        prepare.prepare(listing, folder, PrepareSettings(), workers=1)
    total = time.perf_counter() - start
    taken["grey, shrinking, codes, hashes and the rest"] = total - sum(taken.values())
    return dict(sorted(taken.items(), key=lambda entry: -entry[1]))


@dataclass(frozen=True)
class Stored:
    """Of one clip in one form: bytes as videos and as JPEG, and the stored flow's end-point error in pixels."""

    frames: int
    rgb: int
    flow: int
    jpeg_rgb: int
    jpeg_flow: int
    error: float
    still: float


def stored(path: Path) -> list[Stored]:
    """Encode in every form, decode again, compare with the float flow clipped to the stored range."""
    with VideoSource(path) as source:
        # A size that both codecs take.
        width, height = stored_size(source.width, source.height, codec="vp9", short_side=256, size=None)
        pictures = list(source.frames(width, height, FPS))
    flow = tvl1(np.stack([gray(picture) for picture in pictures]))
    exact = np.clip(flow, -BOUND, BOUND)
    jpeg = [int(cv2.IMWRITE_JPEG_QUALITY), JPEG_QUALITY]
    colour = [cv2.cvtColor(picture, cv2.COLOR_YUV2BGR_I420) for picture in pictures]
    codes = encode_flow(exact).reshape(len(exact), 2, height, width)
    jpeg_rgb = sum(len(cv2.imencode(".jpg", picture, jpeg)[1]) for picture in colour)
    jpeg_flow = sum(len(cv2.imencode(".jpg", plane, jpeg)[1]) for pair in codes for plane in pair)
    found = []
    for codec, scale in FORMS:
        rgb = VideoEncoder(codec, "rgb", width, height, FPS)
        track = transcode.FlowTrack(width, height, FPS, codec=codec, scale=scale, device="cpu")
        # What the track would estimate itself, and has been estimated already.
        flows = iter(flow)
        with mock.patch.object(transcode, "_estimate", partial(following, flows)):
            for picture in pictures:
                rgb.add(picture)
                track.add(gray(picture))
            video = track.finish()
        planes = decode_flow(np.stack(list(decode_luma(video, path.name))))[: len(exact)]
        again = [np.stack([cv2.resize(plane, (width, height)) for plane in pair]) for pair in planes]
        found.append(
            Stored(
                frames=len(pictures),
                rgb=len(rgb.finish()),
                flow=len(video),
                jpeg_rgb=jpeg_rgb,
                jpeg_flow=jpeg_flow,
                error=float(np.mean([np.hypot(*(a - b)).mean() for a, b in zip(again, exact, strict=True)])),
                still=float(np.hypot(exact[:, 0], exact[:, 1]).mean()),
            )
        )
    return found


def following(flows: Iterator[Any], frames: Any, _: Any) -> Any:
    """In place of `transcode._estimate`: the next flows, one fewer than frames."""
    return np.stack([next(flows) for _ in frames[1:]])


def all_stored(listing: SourceListing) -> dict[str, list[list[Stored]]]:
    """For each group of clips what each clip gives in each form."""
    others = [f for name in OTHERS for f in sorted((SHARED / name).rglob("*")) if f.suffix in (".avi", ".mp4")]
    groups = {"skateboard": [clip.path for clip in every(listing, BYTES_EVERY)], ", ".join(OTHERS): others}
    return {name: [stored(path) for path in paths] for name, paths in groups.items()}


def long_video(path: Path, minutes: int) -> Path:
    """A 1080p H.264 file of so many minutes: ten seconds of a moving texture, encoded once and repeated."""
    base = cv2.resize(np.random.default_rng(0).integers(0, 256, (68, 120, 3), dtype=np.uint8), (1920, 1080))
    packets = []
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "0", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for t in range(250):
            packets += stream.encode(av.VideoFrame.from_ndarray(np.roll(base, 4 * t, 1), format="rgb24"))
        packets += stream.encode(None)
        data = [(bytes(p), p.pts, p.dts, p.is_keyframe, p.time_base) for p in packets]
        for repeat in range(6 * minutes):
            for content, pts, dts, key, base_time in data:
                packet = av.Packet(content)
                later = round(repeat * 10 / base_time)
                packet.stream, packet.time_base = stream, base_time
                packet.pts, packet.dts, packet.is_keyframe = pts + later, dts + later, key
                out.mux(packet)
    return path


def peak_memory(folder: Path, minutes: int) -> tuple[int, float]:
    """Frames decoded, and the largest resident memory (GB) of the one process that prepares the file."""
    source = folder / f"in{minutes}" / "a" / "long.mp4"
    source.parent.mkdir(parents=True)
    long_video(source, minutes)
    # Every frame is decoded; a fifth of them is stored, which is what takes the time.
    process = command("folder", source.parents[1], folder / f"out{minutes}", "--workers", 1, "--fps", 5,
                      "--val-fraction", 0)  # fmt: skip
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) if found else 0)
        time.sleep(0.2)
    _, error = process.communicate()
    if process.returncode:
        sys.exit(error)
    return 25 * 60 * minutes, peak / 2**20


def page(found: dict[str, Any]) -> str:
    """The Markdown page."""
    seconds, clips, frames = found["whole"]
    taken: dict[str, float] = found["stages"]
    total = sum(taken.values())
    lines = [
        "# Preparation",
        "",
        f"`python benchmarks/prepare.py --write benchmarks/prepare.md`, {date.today()}, {cpu_facts()[0]}.",
        "",
        "`rev2net prepare folder skateboard OUT`, default settings (H.264, short side 256, flow of half the size),",
        f"{found['workers']} processes: {clips} clips, {frames} frames in {seconds:.0f} s: "
        f"{clips / seconds:.2f} clips/s, {frames / seconds:.1f} frames/s.",
        "",
        f"## Where the time goes (one process, every {STAGES_EVERY}th clip)",
        "",
        "| stage | seconds | share |",
        "|---|---|---|",
        *(f"| {stage} | {value:.1f} | {value / total:.1%} |" for stage, value in taken.items()),
        "",
        f"## Bytes and error of what is stored (every {BYTES_EVERY}th clip of skateboard, all of the others)",
        "",
        f"Kilobytes a clip; JPEG at quality {JPEG_QUALITY}, one per frame for RGB and two for flow, at the size of the",
        "RGB video. The error is the mean end-point distance between the decoded flow, scaled to the RGB's size, and",
        "the float flow clipped to 20 pixels; the length is the mean one of that flow. The form is the codec and the",
        "flow's size beside the RGB's.",
        "",
        "| clips | form | frames | RGB | flow | flow / RGB | RGB JPEG | flow JPEG | error | worst | length |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[list[Stored]]] = found["stored"]
    for number, (codec, scale) in enumerate(FORMS):
        for name, clips_ in {**groups, "all": [clip for group in groups.values() for clip in group]}.items():
            group = [clip[number] for clip in clips_]
            kilo = [mean(getattr(s, part) for s in group) / 1000 for part in ("rgb", "flow", "jpeg_rgb", "jpeg_flow")]
            lines.append(
                f"| {name} ({len(group)}) | {codec}, {scale} | {mean(s.frames for s in group):.0f} | {kilo[0]:.0f} | "
                f"{kilo[1]:.0f} | {kilo[1] / kilo[0]:.2f} | {kilo[2]:.0f} | {kilo[3]:.0f} | "
                f"{mean(s.error for s in group):.3f} | {max(s.error for s in group):.3f} | "
                f"{mean(s.still for s in group):.2f} |"
            )
    lines += [
        "",
        "## Memory of the process that prepares one 1080p file (a fifth of its frames is stored)",
        "",
        "| minutes | frames decoded | peak resident memory, GB |",
        "|---|---|---|",
        *(f"| {minutes} | {count} | {peak:.2f} |" for minutes, (count, peak) in found["memory"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the module."""
    args = page_parser(__doc__).parse_args()
    if not VIDEOS.is_dir():
        sys.exit(f"{VIDEOS} is not there: the real clips are needed")
    workers = len(os.sched_getaffinity(0))
    listing = read_folder(VIDEOS, val_fraction=0)
    folder = Path(tempfile.mkdtemp(prefix="rev2net-prepare-"))
    try:
        part = every(listing, STAGES_EVERY)
        found = {
            "workers": workers,
            "stages": stages(part, listing.classes, folder / "stages"),
            "stored": all_stored(listing),
            "memory": {minutes: peak_memory(folder, minutes) for minutes in MINUTES},
            "whole": whole(folder / "whole", workers),
        }
    finally:
        shutil.rmtree(folder)
    publish(page(found), args.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
