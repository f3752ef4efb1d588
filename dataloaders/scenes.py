"""What a generated clip shows: its random scene, and where the motion has brought the objects at a time.

Positions live on a torus a little larger than the picture (what leaves on one side comes back on the other),
orientations on a circle, and the logarithm of the size on a circle as well, whose seam is hidden by fading (as in
Shepard's endless scale). All of them are uniformly distributed at one time and advance at a constant rate, hence at
every time: the distribution of a frame is the same at the start and at the end of a clip and for every class.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dataloaders.errors import UserError

Floats = npt.NDArray[np.float32]

MOTIONS: dict[str, tuple[Literal["x", "y", "angle", "scale"], int]] = {
    "left": ("x", -1),
    "right": ("x", 1),
    "up": ("y", -1),
    "down": ("y", 1),
    "clockwise": ("angle", 1),
    "counterclockwise": ("angle", -1),
    "approach": ("scale", 1),
    "recede": ("scale", -1),
}
"""Class name -> (what changes, the sign of the change). y points down, so a positive angle turns clockwise."""

CLASSES: tuple[str, ...] = tuple(MOTIONS)
OPPOSITE: dict[str, str] = {
    name: next(n for n, (a, s) in MOTIONS.items() if a == axis and s == -sign) for name, (axis, sign) in MOTIONS.items()
}

TORUS = 1.25
"""Side of the torus of positions, in picture sides."""
RADII = (0.16, 0.38)
"""Smallest and largest radius of an object, in picture sides."""
SPEED = (2.0, 4.0)
"""Slowest and fastest translation, in pixels of a 128-pixel picture per frame."""
ROTATION = (5.0, 10.0)
"""Slowest and fastest rotation, in degrees per frame."""
GROWTH = (0.03, 0.05)
"""Slowest and fastest relative growth per frame."""
FADE = 0.14
"""Share of the circle of sizes over which an object fades in, and out."""
EXTENT = 1.3
"""Half the side of an object's patch in units of its radius; no outline reaches further."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What all clips of one domain have in common; ranges are uniform, lengths in pixels of a 128-pixel picture."""

    outline: Literal["blob", "polygon"]
    objects: tuple[int, int]
    hue: Range
    saturation: Range
    value: Range
    backdrop: Range
    """Lightness of the objects' and of the background's colours."""
    contrast: Range
    slope: Range
    """Exponent of the textures' amplitude spectrum: 1.5 is cloudy, 0.5 is grainy."""
    stripes: float
    """Probability that a texture is a hard-edged stripe pattern instead of a cloud."""
    pan: float
    spin: float
    zoom: float
    """Largest pixels, degrees and relative growth per frame of the background."""
    shake: float
    """Standard deviation of the hand-held camera's shake, in pixels; it moves objects and background together."""
    blur: Range
    noise: Range
    """Standard deviation of the sensor noise in grey levels."""


DOMAINS: dict[str, Domain] = {
    "a": Domain(
        outline="blob", objects=(6, 8), hue=(-0.06, 0.22), saturation=(0.35, 0.95), value=(0.6, 1.0),
        backdrop=(0.1, 0.4), contrast=(0.7, 1.0), slope=(1.0, 1.5), stripes=0.0,
        pan=0.4, spin=0.2, zoom=0.002, shake=0.0, blur=(0.0, 0.4), noise=(1.0, 3.0),
    ),
    "b": Domain(
        outline="polygon", objects=(5, 8), hue=(0.45, 0.80), saturation=(0.0, 0.45), value=(0.45, 0.85),
        backdrop=(0.1, 0.35), contrast=(0.4, 0.9), slope=(0.6, 1.1), stripes=0.5,
        pan=0.8, spin=0.4, zoom=0.004, shake=0.5, blur=(0.5, 1.0), noise=(4.0, 8.0),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSettings:
    """What determines the pixels of a set of clips (with the class, the split and the index of a clip).

    Attributes:
        domain: "a" or "b".
        size: side of the square picture in pixels, even, at least 32.
        frames: frames per clip, at least 2.
        fps: frames per second that the file claims.
        seed: any integer from 0.
    """

    domain: str = "a"
    size: int = 128
    frames: int = 18
    fps: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be rendered (UserError)."""
        if self.domain not in DOMAINS:
            raise UserError(f"domain is {self.domain!r}; it can be {' or '.join(DOMAINS)}.")
        if self.size < 32 or self.size % 2:
            raise UserError(f"size is {self.size}; give an even number of pixels from 32 up.")
        if self.frames < 2:
            raise UserError(f"frames is {self.frames}; motion needs 2 or more.")
        if self.fps < 1:
            raise UserError(f"fps is {self.fps}; give 1 or more.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that is drawn at random for one clip; it knows no class. Times count from the middle of the clip.

    Attributes:
        positions: [K, 2], x and y on the torus, in picture sides, at time 0.
        angles: [K], radians at time 0.
        sizes: [K], place on the circle of sizes [0, 1) at time 0.
        velocity: [2] picture sides per frame along and across the class's axis.
        rotation: [K] radians per frame, positive.
        growth: change of the logarithm of the radius per frame, positive.
        patches: K patches [P, P, 4]: colour times opacity, and opacity.
        background: [B, B, 3], periodic, in grey levels.
        camera: pan x, pan y (pixels), spin (radians), zoom (logarithm) per frame.
        shake: [T, 2] pixels; in the order of growing time.
        blur: sigma in pixels, 0 for none.
        noise: [N, N, 3] grey levels, from which every frame takes a window.
        windows: [T, 2] corners of those windows.
    """

    positions: npt.NDArray[np.float64]
    angles: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64]
    velocity: npt.NDArray[np.float64]
    rotation: npt.NDArray[np.float64]
    growth: float
    patches: tuple[Floats, ...]
    background: Floats
    camera: npt.NDArray[np.float64]
    shake: npt.NDArray[np.float64]
    blur: float
    noise: Floats
    windows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The objects in one frame: position [K, 2] on the torus, angle [K], place on the circle of sizes [K]."""

    positions: npt.NDArray[np.float64]
    angles: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64]


def _cloud(rng: np.random.Generator, side: int, slope: float) -> Floats:
    """Periodic noise [side, side] in [0, 1] with amplitude spectrum 1/f**slope."""
    rows = np.fft.fftfreq(side)[:, None]
    columns = np.fft.rfftfreq(side)[None, :]
    frequency = np.hypot(rows, columns) * side
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency**slope
    field = np.fft.irfft2(spectrum, s=(side, side))
    cloud: Floats = (0.5 + 0.5 * np.tanh(field / (1.2 * field.std()))).astype(np.float32)
    return cloud


def _stripes(rng: np.random.Generator, side: int, period: float) -> Floats:
    """Periodic stripes or checks [side, side] in [0, 1], about `period` pixels from one to the next."""
    angle = rng.uniform(0, math.pi)
    waves = side / period
    turns = np.rint(waves * np.array([math.cos(angle), math.sin(angle)])).astype(int)
    y, x = np.mgrid[:side, :side] * (2 * math.pi / side)
    phase = rng.uniform(0, 2 * math.pi, 2)
    field = np.sin(turns[0] * x + turns[1] * y + phase[0])
    if rng.random() < 0.5:
        field = field * np.sin(turns[1] * x - turns[0] * y + phase[1])
    stripes: Floats = (0.5 + 0.5 * np.tanh(4 * field)).astype(np.float32)
    return stripes


def _texture(rng: np.random.Generator, domain: Domain, side: int, period: float, value: Range) -> Floats:
    """A two-coloured texture [side, side, 3] in grey levels."""
    cloud = _cloud(rng, side, rng.uniform(*domain.slope))
    stripes = _stripes(rng, side, period * rng.uniform(0.7, 1.5))
    field = 0.3 * cloud + 0.7 * stripes if rng.random() < domain.stripes else cloud
    colours = [
        colorsys.hsv_to_rgb(rng.uniform(*domain.hue) % 1, rng.uniform(*domain.saturation), rng.uniform(*value))
        for _ in range(2)
    ]
    low, high = (255 * np.array(c, dtype=np.float32) for c in colours)
    middle, half = (low + high) / 2, (high - low) / 2 * np.float32(rng.uniform(*domain.contrast))
    # Two colours of nearly the same lightness would hide the motion from a grey picture, where flow is measured.
    lightness = float(half.mean())
    half = half + np.float32(math.copysign(max(0.0, 22 - abs(lightness)), lightness))
    texture: Floats = np.clip(middle + half * (2 * field[..., None] - 1), 0, 255).astype(np.float32)
    return texture


def _outline(rng: np.random.Generator, kind: str, angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Radius of a random outline in the given directions, between 0.5 and 1.25."""
    if kind == "blob":
        waves = range(2, 5)
        sizes, phases = rng.uniform(0.02, 0.16, 3), rng.uniform(0, 2 * math.pi, 3)
        bumps = [s * np.cos(k * angle + p) for k, s, p in zip(waves, sizes, phases, strict=True)]
        blob: npt.NDArray[np.float64] = np.clip(0.95 + np.sum(bumps, axis=0), 0.5, 1.25)
        return blob
    corners = int(rng.integers(3, 7))
    edge = np.mod(angle, 2 * math.pi / corners) - math.pi / corners
    stretch = 1 + rng.uniform(-0.2, 0.2) * np.cos(2 * angle)
    return np.clip(1.15 * math.cos(math.pi / corners) / np.cos(edge) * stretch, 0.5, 1.25)


def _patch(rng: np.random.Generator, domain: Domain, side: int) -> Floats:
    """One object at angle 0: [side, side, 4], colour times opacity and opacity."""
    axis = (np.arange(side) - (side - 1) / 2) * (2 * EXTENT / side)
    x, y = axis[None, :], axis[:, None]
    distance = _outline(rng, domain.outline, np.arctan2(y, x)) - np.hypot(x, y)
    opacity = np.clip(distance * side / (2 * EXTENT) + 0.5, 0, 1).astype(np.float32)[..., None]
    return np.concatenate([_texture(rng, domain, side, side / 5, domain.value) * opacity, opacity], axis=2)


def draw_scene(settings: SynthSettings, split: str, name: str, index: int) -> Scene:
    """Draw the scene of one clip from its key; the numbers drawn do not depend on what the class does.

    Args:
        settings: domain, size, frames, seed.
        split: name of the split; part of the key.
        name: class name; part of the key only, so that the classes show different scenes.
        index: index of the clip in its class; clip i is the same however many clips there are.
    """
    domain = DOMAINS[settings.domain]
    text = f"{settings.domain}/{split}/{name}".encode()
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([settings.seed, index, *text])))
    unit = settings.size / 128
    count = int(rng.integers(domain.objects[0], domain.objects[1] + 1))
    # A shifted lattice spreads the objects, yet each of them is uniform on the torus.
    step = np.arange(count)
    lattice = np.stack([step / count, np.mod(step * (math.sqrt(5) - 1) / 2, 1)], axis=1)
    lattice = lattice[:, ::-1] if rng.random() < 0.5 else lattice
    speed, tilt = rng.uniform(*SPEED) / 128, math.radians(rng.uniform(-12, 12))
    side = 2 * settings.size
    margin = 32
    return Scene(
        positions=np.mod(lattice + rng.random(2), 1) * TORUS,
        angles=rng.uniform(0, 2 * math.pi, count),
        sizes=np.mod(rng.permutation(count) / count + rng.random(), 1),
        velocity=speed * np.array([math.cos(tilt), math.sin(tilt)]),
        rotation=np.radians(rng.uniform(*ROTATION, count)),
        growth=float(rng.uniform(*GROWTH)),
        patches=tuple(_patch(rng, domain, settings.size // 2) for _ in range(count)),
        background=_texture(rng, domain, side, 24 * unit, domain.backdrop),
        camera=np.array(
            [
                *(rng.uniform(-domain.pan, domain.pan, 2) * unit),
                math.radians(rng.uniform(-domain.spin, domain.spin)),
                rng.uniform(-domain.zoom, domain.zoom),
            ]
        ),
        shake=rng.normal(0, 1, (settings.frames, 2)) * domain.shake * unit,
        blur=float(rng.uniform(*domain.blur)) * unit,
        noise=(rng.standard_normal((settings.size + margin, settings.size + margin, 3), dtype=np.float32))
        * np.float32(rng.uniform(*domain.noise)),
        windows=rng.integers(0, margin + 1, (settings.frames, 2)),
    )


def times(frames: int, sign: int) -> npt.NDArray[np.float64]:
    """Times of the frames from the middle of the clip, running backwards for sign -1; exactly symmetric."""
    middle = (frames - 1) / 2
    return sign * (np.arange(frames, dtype=np.float64) - middle)


def state_at(scene: Scene, name: str, time: float) -> State:
    """Where class `name` has brought the objects at `time` (frames from the middle, already signed)."""
    axis, _ = MOTIONS[name]
    velocity = {"x": scene.velocity, "y": scene.velocity[::-1]}.get(axis, np.zeros(2))
    rotation = scene.rotation if axis == "angle" else np.zeros_like(scene.rotation)
    growth = scene.growth / math.log(RADII[1] / RADII[0]) if axis == "scale" else 0.0
    return State(
        positions=np.mod(scene.positions + velocity * time, TORUS),
        angles=scene.angles + rotation * time,
        sizes=np.mod(scene.sizes + growth * time, 1),
    )
