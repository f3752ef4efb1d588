"""Generated action clips whose class is visible only in the motion: ``rev2net synth OUT``.

Textured objects move over a textured background that moves by itself. Eight classes: translation to the left, right,
up and down, rotation clockwise and counter-clockwise, growth (approach) and shrinkage (recede). No single frame tells
the class, also not the first or the last one (:mod:`dataloaders.scenes` says why), and a clip played backwards is,
pixel by pixel, the clip of the opposite class with the same scene.

Two domains, ``a`` and ``b``, differ as two data sets do (colours, contrast, texture, shapes, noise, blur, camera),
so that cross-data-set runs work without a download.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dataloaders.errors import UserError
from dataloaders.jit import compiled
from dataloaders.scenes import (
    CLASSES,
    DOMAINS,
    EXTENT,
    FADE,
    MOTIONS,
    OPPOSITE,
    RADII,
    TORUS,
    Scene,
    SynthSettings,
    draw_scene,
    state_at,
    times,
)
from dataloaders.shards import write_atomically, written_aside
from dataloaders.workers import cores, worker_pool

__all__ = [
    "CLASSES",
    "OPPOSITE",
    "SynthSettings",
    "add_synth_arguments",
    "draw_scene",
    "render",
    "run_synth",
    "synthesise",
]

Floats = npt.NDArray[np.float32]
Frames = npt.NDArray[np.uint8]

# x264's lookahead gives different files for the same frames of small pictures (seen at 48, 64 and 96 pixels).
ENCODER = {
    "crf": "18",
    "preset": "veryfast",
    "threads": "1",
    "bf": "0",
    "x264-params": "mbtree=0:rc-lookahead=0:sync-lookahead=0:scenecut=0",
}


@compiled
def _sample_periodic(texture: Floats, view: Floats, out: Floats) -> None:
    """Fill [S, S, 3] from a periodic texture [B, B, 3] seen through a 2x3 map from picture to texture."""
    side = texture.shape[0]
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            at_x = view[0, 0] * x + view[0, 1] * y + view[0, 2]
            at_y = view[1, 0] * x + view[1, 1] * y + view[1, 2]
            left, top = math.floor(at_x), math.floor(at_y)
            fx, fy = at_x - left, at_y - top
            x0, y0 = int(left) % side, int(top) % side
            x1, y1 = (x0 + 1) % side, (y0 + 1) % side
            for c in range(3):
                upper = texture[y0, x0, c] * (1 - fx) + texture[y0, x1, c] * fx
                lower = texture[y1, x0, c] * (1 - fx) + texture[y1, x1, c] * fx
                out[y, x, c] = upper * (1 - fy) + lower * fy


@compiled
def _lay_over(picture: Floats, patch: Floats, view: Floats, left: int, top: int, fade: float) -> None:
    """Lay a patch [P, P, 4] (colour times opacity, opacity) over a window of the picture that starts at (left, top)."""
    side = patch.shape[0]
    for y in range(picture.shape[0]):
        for x in range(picture.shape[1]):
            at_x = view[0, 0] * (x + left) + view[0, 1] * (y + top) + view[0, 2]
            at_y = view[1, 0] * (x + left) + view[1, 1] * (y + top) + view[1, 2]
            if at_x < 0 or at_y < 0 or at_x >= side - 1 or at_y >= side - 1:
                continue
            x0, y0 = int(at_x), int(at_y)
            fx, fy = at_x - x0, at_y - y0
            a, b = fade * (1 - fx) * (1 - fy), fade * fx * (1 - fy)
            c, d = fade * (1 - fx) * fy, fade * fx * fy
            below = 1 - (
                a * patch[y0, x0, 3] + b * patch[y0, x0 + 1, 3]
                + c * patch[y0 + 1, x0, 3] + d * patch[y0 + 1, x0 + 1, 3]
            )  # fmt: skip
            for k in range(3):
                picture[y, x, k] = (
                    below * picture[y, x, k]
                    + a * patch[y0, x0, k] + b * patch[y0, x0 + 1, k]
                    + c * patch[y0 + 1, x0, k] + d * patch[y0 + 1, x0 + 1, k]
                )  # fmt: skip


def _affine(turn: float, scale: float, centre: tuple[float, float], target: tuple[float, float]) -> Floats:
    """The 2x3 map that turns and scales about `centre` and brings it to `target`."""
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    x, y = centre
    rows = [[c, -s, target[0] - c * x + s * y], [s, c, target[1] - s * x - c * y]]
    return np.array(rows, dtype=np.float32)


def _paint(picture: Floats, patch: Floats, x: float, y: float, radius: float, angle: float, fade: float) -> None:
    """Lay one object over the picture, its centre at pixel (x, y)."""
    size, reach = picture.shape[0], 1.5 * EXTENT * radius
    left, right = max(0, math.floor(x - reach)), min(size, math.ceil(x + reach) + 1)
    top, bottom = max(0, math.floor(y - reach)), min(size, math.ceil(y + reach) + 1)
    if left >= right or top >= bottom:
        return
    side = patch.shape[0]
    middle = (side - 1) / 2
    view = _affine(-angle, side / (2 * EXTENT * radius), (x, y), (middle, middle))
    _lay_over(picture[top:bottom, left:right], patch, view, left, top, fade)


@compiled
def _convolve(picture: Floats, weights: Floats, out: Floats) -> None:
    """Separable convolution of [H, W, C] with an odd kernel, edges repeated; `picture` is overwritten on the way."""
    height, width, channels = picture.shape
    reach = weights.shape[0] // 2
    for y in range(height):
        for x in range(width):
            for c in range(channels):
                total = np.float32(0.0)
                for i in range(-reach, reach + 1):
                    total += weights[i + reach] * picture[y, min(max(x + i, 0), width - 1), c]
                out[y, x, c] = total
    picture[:] = 0.0
    for y in range(height):
        for i in range(-reach, reach + 1):
            source = min(max(y + i, 0), height - 1)
            for x in range(width):
                for c in range(channels):
                    picture[y, x, c] += weights[i + reach] * out[source, x, c]
    out[:] = picture


def _blur(picture: Floats, sigma: float) -> Floats:
    """Gaussian blur [H, W, C]; `picture` is used up."""
    reach = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    out = np.empty_like(picture)
    _convolve(picture, (weights / weights.sum()).astype(np.float32), out)
    return out


def _frame(scene: Scene, name: str, time: float, slot: int, size: int) -> Frames:
    """Render the picture at a (signed) time; `slot` is its place in the order of growing time."""
    middle, half = (size - 1) / 2, scene.background.shape[0] / 2
    pan_x, pan_y, spin, zoom = (float(c) * time for c in scene.camera)
    shake_x, shake_y = (float(s) for s in scene.shake[slot])
    view = _affine(spin, math.exp(zoom), (middle + shake_x, middle + shake_y), (half + pan_x, half + pan_y))
    picture = np.empty((size, size, 3), np.float32)
    _sample_periodic(scene.background, view, picture)
    state = state_at(scene, name, time)
    period, margin = TORUS * size, (TORUS - 1) / 2 * size
    # Larger is nearer.
    for k in np.argsort(state.sizes, kind="stable"):
        place = float(state.sizes[k])
        radius = RADII[0] * (RADII[1] / RADII[0]) ** place * size
        edge = min(1.0, min(place, 1 - place) / FADE)
        fade = edge * edge * (3 - 2 * edge)
        x, y = (float(p) * size - margin for p in state.positions[k])
        for dx in (-period, 0.0, period):
            for dy in (-period, 0.0, period):
                at = (x + dx + shake_x, y + dy + shake_y)
                _paint(picture, scene.patches[k], *at, radius, float(state.angles[k]), fade)
    if scene.blur > 0.2:
        picture = _blur(picture, scene.blur)
    top, left = scene.windows[slot]
    noisy = picture + scene.noise[top : top + size, left : left + size]
    frame: Frames = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return frame


def render(scene: Scene, name: str, *, size: int) -> Frames:
    """Render a scene moving as class `name`.

    Returns:
        uint8 [T, size, size, 3], RGB. ``render(scene, OPPOSITE[name], ...)`` is the same frames in reverse.
    """
    frames = len(scene.shake)
    sign = MOTIONS[name][1]
    slots = range(frames) if sign > 0 else range(frames - 1, -1, -1)
    return np.stack(
        [_frame(scene, name, float(t), slot, size) for t, slot in zip(times(frames, sign), slots, strict=True)]
    )


def write_clip(path: Path, frames: Frames, fps: int) -> None:
    """Encode frames [T, H, W, 3] as H.264 (crf 18, BT.601 limited range) into `path`, whole or not at all."""
    # Without `file:` a path like run:1/clips is an address.
    with written_aside(path) as aside, av.open(f"file:{aside}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=ENCODER)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One clip to make."""

    split: str
    name: str
    index: int

    def path(self, out: Path) -> Path:
        """Where the clip goes: OUT/split/class/class_0000.mp4."""
        return out / self.split / self.name / f"{self.name}_{self.index:04d}.mp4"


def _make(out: Path, settings: SynthSettings, job: Job) -> None:
    scene = draw_scene(settings, job.split, job.name, job.index)
    write_clip(job.path(out), render(scene, job.name, size=settings.size), settings.fps)


def _claim(out: Path, settings: SynthSettings, counts: dict[str, int]) -> None:
    """Mark `out` as made with these settings, or refuse a folder that holds something else (UserError)."""
    record = {"format": 1, **asdict(settings), "clips_per_class": counts}
    mark = out / "synth.json"
    if mark.is_file():
        try:
            found = json.loads(mark.read_bytes())
        except ValueError as error:
            raise UserError(f"{mark} is damaged ({error}); choose another folder or delete this one.") from error
        if found != record:
            raise UserError(f"{out} holds clips generated with other settings; choose another folder or delete it.")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds something else; choose a new or empty folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, (json.dumps(record, indent=1) + "\n").encode())


def synthesise(out: Path, settings: SynthSettings, counts: dict[str, int], *, workers: int | None = None) -> int:
    """Make the clips that `out` lacks: OUT/split/class/class_0000.mp4; run again after an interruption it goes on.

    Args:
        out: folder, new or made by an earlier run with the same settings.
        settings: what determines the pixels.
        counts: clips per class for every split.
        workers: processes; the number of cores unless given. The clips do not depend on it.

    Returns:
        The number of clips made now.

    Raises:
        UserError: a count or `workers` is out of range, or the folder holds something else.
    """
    workers = len(cores()) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers is {workers}; give 1 or more.")
    if min(counts.values()) < 0 or sum(counts.values()) == 0:
        raise UserError(f"clips per class are {counts}; give 0 or more for every split, and 1 or more for one.")
    _claim(out, settings, counts)
    for split, count in counts.items():
        for name in CLASSES if count else ():
            (out / split / name).mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(split=split, name=name, index=i)
        for split, count in counts.items()
        for name in CLASSES
        for i in range(count)
    ]
    jobs = [job for job in jobs if not job.path(out).exists()]
    make = partial(_make, out, settings)
    for _ in tqdm(_map(make, jobs, workers), total=len(jobs), unit="clip", disable=not sys.stderr.isatty()):
        pass
    return len(jobs)


def _map(make: partial[None], jobs: list[Job], workers: int) -> Iterator[None]:
    if workers == 1 or len(jobs) < 8:
        yield from map(make, jobs)
        return
    # The first clip compiles the loops once for all processes.
    yield make(jobs[0])
    with worker_pool(min(workers, len(jobs))) as pool:
        yield from pool.map(make, jobs[1:], chunksize=4)


def add_synth_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``rev2net synth`` to a parser."""
    parser.description = "Generate action clips whose class is visible only in the motion, a folder per class."
    parser.epilog = (
        "examples:\n  rev2net synth clips\n"
        "  rev2net synth clips-b --domain b --clips-per-class 24 --val-per-class 12 --size 64"
    )
    default = SynthSettings()
    parser.add_argument("out", type=Path, help="folder to make: OUT/{train,val}/CLASS/CLASS_0000.mp4")
    parser.add_argument(
        "--domain", default=default.domain, choices=list(DOMAINS), help="look of the clips (%(default)s)"
    )
    parser.add_argument("--clips-per-class", type=int, default=24, help="training clips per class (%(default)s)")
    parser.add_argument("--val-per-class", type=int, default=10, help="validation clips per class (%(default)s)")
    parser.add_argument("--size", type=int, default=default.size, help="side of the picture in pixels (%(default)s)")
    parser.add_argument("--frames", type=int, default=default.frames, help="frames per clip (%(default)s)")
    parser.add_argument("--fps", type=int, default=default.fps, help="frames per second (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="same seed, same frames (%(default)s)")
    parser.add_argument("--workers", type=int, default=None, help="processes (the number of cores)")


def run_synth(args: argparse.Namespace) -> int:
    """Run ``rev2net synth``; returns the exit status, raises UserError for a user's mistake."""
    settings = SynthSettings(domain=args.domain, size=args.size, frames=args.frames, fps=args.fps, seed=args.seed)
    counts = {"train": args.clips_per_class, "val": args.val_per_class}
    made = synthesise(args.out, settings, counts, workers=args.workers)
    total = len(CLASSES) * sum(counts.values())
    print(f"{args.out}: {total} clips of {len(CLASSES)} classes ({made} made now), domain {settings.domain}")
    return 0
