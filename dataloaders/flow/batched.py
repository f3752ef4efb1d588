"""TV-L1 on many frame pairs at once, in PyTorch: the form for GPUs.

The same method, parameters and discrete choices as :mod:`dataloaders.flow.tvl1`, which is the faster one on a CPU. The
order of the arithmetic differs, so the two agree to 0.01 pixel on average, not bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dataloaders.flow.kernels import EPSILON, MARGIN
from dataloaders.flow.tvl1 import DEFAULT, SMALLEST_LEVEL, Tvl1, check_frames

CHECK_EVERY = 5
"""Iterations between two looks at whether any pair still moves: each look waits for the GPU."""


def tvl1_batched(frames: Tensor, *, settings: Tvl1 = DEFAULT) -> Tensor:
    """Optical flow between the consecutive frames of a clip, on the device of `frames`.

    Args:
        frames: grey frames [T, H, W], uint8, or float32 in the same range 0..255; all pairs are worked on at once, in
            about 250 bytes of memory a pixel each.
        settings: parameters of the method.

    Returns:
        float32 [T - 1, 2, H, W], pixels: flow t leads from frame t to frame t + 1, u (right) before v (down).

    Raises:
        ValueError: the frames are not [T, H, W] of uint8 or float32 with T >= 1 and H, W >= 3.
    """
    check_frames(str(frames.dtype).removeprefix("torch."), frames.shape)
    if len(frames) == 1:
        return torch.empty((0, 2, *frames.shape[1:]), device=frames.device)
    levels = [frames.float()]  # each frame but the first and the last is in two pairs; its pyramid is built once
    while len(levels) < settings.levels:
        smaller = tuple(round(side * settings.scale) for side in levels[-1].shape[1:])
        if min(smaller) < SMALLEST_LEVEL:
            break
        levels.append(_resize(levels[-1], smaller, (1 / settings.scale, 1 / settings.scale)))
    flow = torch.zeros((len(frames) - 1, 2, *levels[-1].shape[1:]), device=frames.device)
    for level in reversed(levels):
        size = level.shape[1:]
        if flow.shape[2:] != size:
            ratios = (flow.shape[2] / size[0], flow.shape[3] / size[1])
            flow = _resize(flow, tuple(size), ratios) / settings.scale
        flow = _refine(level[:-1], level[1:], flow, settings)
    return flow


def _resize(pictures: Tensor, size: tuple[int, ...], steps: tuple[float, float]) -> Tensor:
    """Bilinear, without antialiasing, [..., H, W] -> [..., *size]; `steps` are source pixels per output pixel.

    Not `F.interpolate`: it takes the sampling step from one of the two sizes, and a pyramid's step is exactly 1/0.8
    whatever the sizes round to.
    """
    for axis, count, step in ((-2, size[0], steps[0]), (-1, size[1], steps[1])):
        length = pictures.shape[axis]
        at = ((torch.arange(count, device=pictures.device, dtype=torch.float64) + 0.5) * step - 0.5).clamp(
            0, length - 1
        )
        first = at.long().clamp(max=max(length - 2, 0))
        share = (at - first).float()
        before = pictures.index_select(axis, first)
        after = pictures.index_select(axis, (first + 1).clamp(max=length - 1))
        pictures = torch.lerp(before, after, share if axis == -1 else share.unsqueeze(-1))
    return pictures


def _with_gradient(pictures: Tensor) -> Tensor:
    """[B, H, W] -> [B, 3, H, W]: the picture, its central differences along x and y (one-sided and halved at edges)."""
    padded = F.pad(pictures.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
    dx = 0.5 * (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])
    dy = 0.5 * (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])
    return torch.cat([pictures.unsqueeze(1), dx, dy], 1)


def _median5(flow: Tensor) -> Tensor:
    """Median of the 5x5 window around every pixel of [B, 2, H, W]; edges are repeated."""
    windows = F.pad(flow, (2, 2, 2, 2), mode="replicate").unfold(2, 5, 1).unfold(3, 5, 1)
    # One component at a time: the windows, laid out, are the largest thing that is ever in memory.
    return torch.stack([windows[:, c].flatten(-2).median(-1).values for c in range(2)], 1)


def _taps(share: Tensor) -> tuple[Tensor, ...]:
    """Cubic weights (A = -0.75) of the four pixels around a position `share` of a pixel after the second."""
    a = -0.75

    def outer(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    def inner(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    return outer(1 + share), inner(share), inner(1 - share), outer(2 - share)


def _sample(pictures: Tensor, flow: Tensor) -> Tensor:
    """Cubic interpolation of [B, C, H, W] at every pixel displaced by [B, 2, H, W]; black outside.

    Not `F.grid_sample`: its coordinates, scaled to -1..1 and back, miss whole pixels by a rounding error, and a still
    clip would move.
    """
    height, width = pictures.shape[2:]
    padded = F.pad(pictures, (MARGIN,) * 4).flatten(2)
    line = width + 2 * MARGIN
    # From 3 pixels outside on, every tap lies in the margin.
    x = (torch.arange(width, device=flow.device) + flow[:, 0]).clamp(-3, width + 1)
    y = (torch.arange(height, device=flow.device).view(-1, 1) + flow[:, 1]).clamp(-3, height + 1)
    left, top = x.floor(), y.floor()
    corner = (top.long() + MARGIN - 1) * line + left.long() + MARGIN - 1
    across, down = _taps(x - left), _taps(y - top)
    out = torch.zeros_like(pictures)
    for row in range(4):
        for column in range(4):
            at = (corner + (row * line + column)).flatten(1).unsqueeze(1).expand(-1, pictures.shape[1], -1)
            out += (down[row] * across[column]).unsqueeze(1) * padded.gather(2, at).view_as(pictures)
    return out


def _linearise(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Warp the second picture and its gradient ([B, 3, H, W], black outside) by the flow.

    Returns:
        The warped gradient [B, 2, H, W], 1 / |gradient|^2 (0 where that is 0), and the part of the brightness residual
        that does not depend on the flow, both [B, H, W].
    """
    warped = _sample(second, flow)
    gradient = warped[:, 1:]
    square = gradient.square().sum(1)
    inverse = torch.where(square > EPSILON, 1 / square, 0)
    return gradient, inverse, warped[:, 0] - (gradient * flow).sum(1) - first


def _iterate(
    flow: Tensor, px: Tensor, py: Tensor, data: tuple[Tensor, Tensor, Tensor], moving: Tensor, settings: Tvl1
) -> Tensor:
    """One inner iteration, in place, of the pairs that still move; returns each pair's sum of squared changes.

    px and py [B, 2, H, W] are the dual variables; what they would be left of the first column and above the first
    row is 0.
    """
    gradient, inverse, constant = data
    limit = settings.attachment * settings.theta
    residual = constant + (gradient * flow).sum(1)
    threshold = (-residual * inverse).clamp(-limit, limit)
    # Backward differences, the adjoint of the forward differences below.
    divergence = px - F.pad(px, (1, 0))[..., :-1] + py - F.pad(py, (0, 0, 1, 0))[..., :-1, :]
    change = (threshold.unsqueeze(1) * gradient + settings.theta * divergence) * moving
    flow += change
    step = settings.tau / settings.theta
    dx = F.pad(flow.diff(dim=-1), (0, 1)) * step
    dy = F.pad(flow.diff(dim=-2), (0, 0, 0, 1)) * step
    shrink = 1 + (dx.square() + dy.square()).sqrt()
    # The duals of a pair that has come to rest would go on changing, and start its next block from elsewhere.
    px.copy_(torch.where(moving > 0, (px + dx) / shrink, px))
    py.copy_(torch.where(moving > 0, (py + dy) / shrink, py))
    return change.square().sum((1, 2, 3))


def _refine(first: Tensor, second: Tensor, flow: Tensor, settings: Tvl1) -> Tensor:
    """Improve the flow [B, 2, H, W] at one level of the pyramid ([B, H, W] each)."""
    enough = settings.epsilon**2 * first[0].numel()
    target = _with_gradient(second)
    px, py = torch.zeros_like(flow), torch.zeros_like(flow)
    for _ in range(settings.warps):
        data = _linearise(first, target, flow)
        change = torch.full((len(flow),), torch.inf, device=flow.device)
        for _ in range(settings.outer):
            if not bool((change > enough).any()):
                break
            flow = torch.where((change > enough).view(-1, 1, 1, 1), _median5(flow), flow)
            for i in range(settings.inner):
                moving = change > enough
                if i % CHECK_EVERY == CHECK_EVERY - 1 and not bool(moving.any()):
                    break
                new = _iterate(flow, px, py, data, moving.view(-1, 1, 1, 1).float(), settings)
                change = torch.where(moving, new, change)
    return flow
