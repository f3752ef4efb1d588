"""TV-L1 optical flow after Zach, Pock and Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow" (2007).

The parameters and discrete choices are those of OpenCV's DualTVL1OpticalFlow, the field's reference: 5 levels of
bilinear x0.8, 5 warps per level by cubic interpolation with black outside the picture, median filtering
before every block of inner iterations, forward differences with their adjoint divergence, and a stop when
the mean squared change of an iteration falls to epsilon squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dataloaders.flow import kernels
from dataloaders.workers import cores

Floats = npt.NDArray[np.float32]

SMALLEST_LEVEL = 16
"""A level of the pyramid has at least this many rows and columns (the first level always exists)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tvl1:
    """Parameters of the energy and of its minimisation (defaults: OpenCV's; grey levels run from 0 to 255).

    Attributes:
        tau: time step of the dual iteration.
        attachment: lambda, weight of the brightness residual.
        theta: tightness of the coupling between the two sub-problems.
        epsilon: an iteration whose root mean squared change is at most this (pixels) is the last.
        levels, scale: size of the pyramid and ratio between its levels.
        warps, outer, inner: warps per level, blocks per warp (a median filter starts each), iterations per block.
    """

    tau: float = 0.25
    attachment: float = 0.15
    theta: float = 0.3
    epsilon: float = 0.01
    levels: int = 5
    scale: float = 0.8
    warps: int = 5
    outer: int = 10
    inner: int = 30


DEFAULT = Tvl1()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One picture at one level: its pixels [H, W], and those with gradient and margin [H + 8, W + 8, 3]."""

    pixels: Floats
    with_gradient: Floats


def _pyramid(frame: npt.NDArray[np.generic], settings: Tvl1) -> list[_Level]:
    pixels = np.ascontiguousarray(frame, dtype=np.float32)
    levels: list[_Level] = []
    while True:
        height, width = pixels.shape
        target = np.empty((height + 2 * kernels.MARGIN, width + 2 * kernels.MARGIN, 3), np.float32)
        kernels.with_gradient(pixels, target)
        levels.append(_Level(pixels=pixels, with_gradient=target))
        smaller = (round(height * settings.scale), round(width * settings.scale))
        if len(levels) == settings.levels or min(smaller) < SMALLEST_LEVEL:
            return levels
        shrunk = np.empty(smaller, np.float32)
        kernels.resize(pixels, shrunk, 1 / settings.scale, 1 / settings.scale, 1.0)
        pixels = shrunk


def _pair(first: Sequence[_Level], second: Sequence[_Level], out: Floats, settings: Tvl1) -> None:
    reals = np.array(
        [settings.attachment * settings.theta, settings.theta, settings.tau / settings.theta, settings.epsilon]
    )
    counts = np.array([settings.warps, settings.outer, settings.inner], dtype=np.int64)
    flow = np.zeros((2, *first[-1].pixels.shape), np.float32)
    for low, high in zip(reversed(first), reversed(second), strict=True):
        shape = low.pixels.shape
        if flow.shape[1:] != shape:
            finer = np.empty((2, *shape), np.float32)
            ratios = flow.shape[1] / shape[0], flow.shape[2] / shape[1]
            for component in range(2):
                kernels.resize(flow[component], finer[component], *ratios, 1 / settings.scale)
            flow = finer
        kernels.refine(low.pixels, high.with_gradient, flow, reals, counts)
    out[:] = flow


def check_frames(dtype: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a clip is [T, H, W] of uint8 or float32 with T >= 1 and H, W >= 3."""
    if len(shape) != 3 or dtype not in ("uint8", "float32") or min(shape) < 1:
        raise ValueError(f"frames are {dtype} {tuple(shape)}; expected uint8 or float32 [T, H, W]")
    if min(shape[1:]) < 3:
        raise ValueError(f"frames of {shape[2]}x{shape[1]} pixels are too small; 3x3 is the least")


def tvl1(frames: npt.NDArray[np.uint8] | Floats, *, threads: int | None = None, settings: Tvl1 = DEFAULT) -> Floats:
    """Optical flow between the consecutive frames of a clip.

    Args:
        frames: grey frames [T, H, W], uint8, or float32 in the same range 0..255.
        threads: pairs worked on at a time; the number of cores unless given. The result does not depend on it.
        settings: parameters of the method.

    Returns:
        float32 [T - 1, 2, H, W], pixels: flow t leads from frame t to frame t + 1, u (right) before v (down).

    Raises:
        ValueError: the frames are not [T, H, W] of uint8 or float32 with T >= 1 and H, W >= 3, or threads < 1.
    """
    check_frames(str(frames.dtype), frames.shape)
    threads = len(cores()) if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more")
    pairs = len(frames) - 1
    flow = np.empty((pairs, 2, *frames.shape[1:]), np.float32)
    pyramids = map(partial(_pyramid, settings=settings), frames)
    if threads == 1 or pairs < 2:
        before = next(pyramids)
        for t, after in enumerate(pyramids):
            _pair(before, after, flow[t], settings)
            before = after
        return flow
    with ThreadPoolExecutor(min(threads, pairs)) as pool:
        levels = list(pool.map(partial(_pyramid, settings=settings), frames))
        list(pool.map(partial(_pair, settings=settings), levels[:-1], levels[1:], flow))
    return flow
