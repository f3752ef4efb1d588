"""The loops of TV-L1. Arrays are float32 and C-contiguous unless said; one pair of frames is one thread's work."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt

from dataloaders.jit import compiled, inlined

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.uint64]
Reals = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

MARGIN = 4
# float32 constants: a Python float would make the arithmetic float64.
CUBIC = cast(float, np.float32(-0.75))
F0, F1, F2, F3, F4, F5, F8 = (cast(float, np.float32(i)) for i in (0, 1, 2, 3, 4, 5, 8))
EPSILON = float(np.finfo(np.float32).eps)
# Unsigned indices: numba tests signed ones for being negative, and the test keeps a loop from being vectorised.
U1, U2, U3, U6, U9 = (np.uint64(i) for i in (1, 2, 3, 6, 9))


@compiled
def resize(source: Floats, out: Floats, scale_y: float, scale_x: float, gain: float) -> None:
    """Bilinear resize without antialiasing, pixel centres at half integers, edges clamped; times `gain`.

    `scale_y` and `scale_x` are source pixels per output pixel.
    """
    rows, columns = out.shape
    height, width = source.shape
    left = np.empty(columns, np.int64)
    share = np.empty(columns, np.float32)
    for x in range(columns):
        at = (x + 0.5) * scale_x - 0.5
        at = min(max(at, 0.0), width - 1.0)
        left[x] = min(int(at), max(width - 2, 0))
        share[x] = at - left[x]
    right = min(1, width - 1)
    for y in range(rows):
        at = (y + 0.5) * scale_y - 0.5
        at = min(max(at, 0.0), height - 1.0)
        top = min(int(at), max(height - 2, 0))
        bottom = min(top + 1, height - 1)
        down = np.float32(at - top)
        for x in range(columns):
            i = left[x]
            upper = source[top, i] + share[x] * (source[top, i + right] - source[top, i])
            lower = source[bottom, i] + share[x] * (source[bottom, i + right] - source[bottom, i])
            out[y, x] = np.float32(gain) * (upper + down * (lower - upper))


@compiled
def with_gradient(image: Floats, out: Floats) -> None:
    """Write [H + 8, W + 8, 3]: the image, its central differences along x and y; a margin of 4 pixels is zero.

    At the edges the difference is one-sided and halved.
    """
    height, width = image.shape
    half = np.float32(0.5)
    out[:] = 0.0
    for y in range(height):
        above, below = max(y - 1, 0), min(y + 1, height - 1)
        for x in range(width):
            before, after = max(x - 1, 0), min(x + 1, width - 1)
            out[y + MARGIN, x + MARGIN, 0] = image[y, x]
            out[y + MARGIN, x + MARGIN, 1] = half * (image[y, after] - image[y, before])
            out[y + MARGIN, x + MARGIN, 2] = half * (image[below, x] - image[above, x])


@inlined
def _four(line: Floats, at: int, w0: float, w1: float, w2: float, w3: float) -> float:
    """Weighted sum of four neighbouring pixels of an interleaved row, one channel."""
    total: float = w0 * line[at] + w1 * line[at + U3] + w2 * line[at + U6] + w3 * line[at + U9]
    return total


@inlined
def _outer_tap(d: float) -> float:
    """Weight of a pixel 1 to 2 pixels away."""
    return ((CUBIC * d - F5 * CUBIC) * d + F8 * CUBIC) * d - F4 * CUBIC


@inlined
def _inner_tap(d: float) -> float:
    """Weight of a pixel up to 1 pixel away."""
    return ((CUBIC + F2) * d - (CUBIC + F3)) * d * d + F1


@inlined
def _taps(share: float) -> tuple[float, float, float, float]:
    """Weights of the four pixels around a position that lies `share` of a pixel right of the second."""
    return _outer_tap(F1 + share), _inner_tap(share), _inner_tap(F1 - share), _outer_tap(F2 - share)


@compiled
def _sample_row(pixels: Floats, stride: np.uint64, at: Indices, taps: Floats, out: Floats) -> None:
    """Cubic interpolation (A = -0.75) of interleaved pixels (3 channels, flat) at every position of one row.

    `at` is the index of the first of the 16 pixels, `taps` [8, W] the weights across and down.
    """
    for x in range(at.shape[0]):
        w0, w1, w2, w3 = taps[0, x], taps[1, x], taps[2, x], taps[3, x]
        v0, v1, v2, v3 = taps[4, x], taps[5, x], taps[6, x], taps[7, x]
        k = at[x]
        m = k + stride
        n = m + stride
        o = n + stride
        a = v0 * _four(pixels, k, w0, w1, w2, w3)
        b = v0 * _four(pixels, k + U1, w0, w1, w2, w3)
        c = v0 * _four(pixels, k + U2, w0, w1, w2, w3)
        a += v1 * _four(pixels, m, w0, w1, w2, w3)
        b += v1 * _four(pixels, m + U1, w0, w1, w2, w3)
        c += v1 * _four(pixels, m + U2, w0, w1, w2, w3)
        a += v2 * _four(pixels, n, w0, w1, w2, w3)
        b += v2 * _four(pixels, n + U1, w0, w1, w2, w3)
        c += v2 * _four(pixels, n + U2, w0, w1, w2, w3)
        a += v3 * _four(pixels, o, w0, w1, w2, w3)
        b += v3 * _four(pixels, o + U1, w0, w1, w2, w3)
        c += v3 * _four(pixels, o + U2, w0, w1, w2, w3)
        out[0, x], out[1, x], out[2, x] = a, b, c


@compiled
def linearise(first: Floats, second: Floats, flow: Floats, data: Floats) -> None:
    """Warp the second image and its gradient by the flow and linearise the brightness residual around it.

    Args:
        first: [H, W].
        second: [H + 8, W + 8, 3] of :func:`with_gradient`; what lies outside the picture is 0.
        flow: [2, H, W], the point of linearisation.
        data: [4, H, W], written: warped gradient x and y, 1 / |gradient|^2 (0 where that is 0), and the part of the
            residual that does not depend on the flow.
    """
    height, width = first.shape
    pixels = second.ravel()
    line = 3 * (width + 2 * MARGIN)
    at = np.empty(width, np.uint64)
    taps = np.empty((8, width), np.float32)
    warped = np.empty((3, width), np.float32)
    low, right, bottom = np.float32(-3.0), np.float32(width + 1), np.float32(height + 1)
    for y in range(height):
        u, v = flow[0, y], flow[1, y]
        row = np.float32(y)
        for x in range(width):
            # From 3 pixels outside on, every tap lies in the margin.
            at_x = min(max(np.float32(x) + u[x], low), right)
            at_y = min(max(row + v[x], low), bottom)
            left, top = np.floor(at_x), np.floor(at_y)
            at[x] = (np.int64(top) + (MARGIN - 1)) * line + 3 * (np.int64(left) + (MARGIN - 1))
            taps[0, x], taps[1, x], taps[2, x], taps[3, x] = _taps(at_x - left)
            taps[4, x], taps[5, x], taps[6, x], taps[7, x] = _taps(at_y - top)
        _sample_row(pixels, np.uint64(line), at, taps, warped)
        gx, gy, inverse, constant, base = data[0, y], data[1, y], data[2, y], data[3, y], first[y]
        for x in range(width):
            b, c = warped[1, x], warped[2, x]
            square = b * b + c * c
            gx[x], gy[x] = b, c
            inverse[x] = F1 / square if square > EPSILON else F0
            constant[x] = warped[0, x] - b * u[x] - c * v[x] - base[x]


@inlined
def _sort5(a: float, b: float, c: float, d: float, e: float) -> tuple[float, float, float, float, float]:
    a, b = min(a, b), max(a, b)
    d, e = min(d, e), max(d, e)
    c, e = min(c, e), max(c, e)
    c, d = min(c, d), max(c, d)
    a, d = min(a, d), max(a, d)
    b, e = min(b, e), max(b, e)
    a, c = min(a, c), max(a, c)
    b, d = min(b, d), max(b, d)
    b, c = min(b, c), max(b, c)
    return a, b, c, d, e


@inlined
def _middle13(
    a: float, b: float, c: float, d: float, e: float, f: float, g: float,
    h: float, i: float, j: float, k: float, m: float, n: float,
) -> float:  # fmt: skip
    """Median of 13 values: take 8, drop the least and the greatest, add one, and so on."""
    # 8 of 13: after the exchanges a is the least and h the greatest.
    a, b = min(a, b), max(a, b)
    c, d = min(c, d), max(c, d)
    e, f = min(e, f), max(e, f)
    g, h = min(g, h), max(g, h)
    a, c = min(a, c), max(a, c)
    e, g = min(e, g), max(e, g)
    a, e = min(a, e), max(a, e)
    b, d = min(b, d), max(b, d)
    f, h = min(f, h), max(f, h)
    d, h = min(d, h), max(d, h)
    # b..g stay; i enters, b becomes the least and i the greatest of the seven.
    b, c = min(b, c), max(b, c)
    d, e = min(d, e), max(d, e)
    f, g = min(f, g), max(f, g)
    b, d = min(b, d), max(b, d)
    b, f = min(b, f), max(b, f)
    b, i = min(b, i), max(b, i)
    c, i = min(c, i), max(c, i)
    e, i = min(e, i), max(e, i)
    g, i = min(g, i), max(g, i)
    # c..g stay; j enters.
    c, d = min(c, d), max(c, d)
    e, f = min(e, f), max(e, f)
    g, j = min(g, j), max(g, j)
    c, e = min(c, e), max(c, e)
    c, g = min(c, g), max(c, g)
    d, j = min(d, j), max(d, j)
    f, j = min(f, j), max(f, j)
    # d..g stay; k enters.
    d, e = min(d, e), max(d, e)
    f, g = min(f, g), max(f, g)
    d, f = min(d, f), max(d, f)
    d, k = min(d, k), max(d, k)
    e, k = min(e, k), max(e, k)
    g, k = min(g, k), max(g, k)
    # e..g stay; m enters.
    e, f = min(e, f), max(e, f)
    g, m = min(g, m), max(g, m)
    e, g = min(e, g), max(e, g)
    f, m = min(f, m), max(f, m)
    # f and g stay; n enters.
    return max(min(f, g), min(max(f, g), n))


@compiled
def median5(image: Floats, columns: Floats, out: Floats) -> None:
    """Median of the 5x5 window around every pixel; edges are repeated.

    The five values of every window column are sorted (once, for the five windows that share it), then the five rows
    of sorted values partially. A matrix sorted along both axes leaves 13 candidates for its median: element (i, j),
    counted from 0, has at least (i+1)(j+1)-1 values below it and (5-i)(5-j)-1 above. Six of the others lie on each
    side, so the window's median is the candidates' median.

    Args:
        image: [H, W].
        columns: [5, W + 4], scratch.
        out: [H, W], written; not `image` itself.
    """
    height, width = image.shape
    for y in range(height):
        r0, r1 = image[max(y - 2, 0)], image[max(y - 1, 0)]
        r3, r4 = image[min(y + 1, height - 1)], image[min(y + 2, height - 1)]
        r2 = image[y]
        c0, c1, c2, c3, c4 = columns[0], columns[1], columns[2], columns[3], columns[4]
        for x in range(width):
            v0, v1, v2, v3, v4 = _sort5(r0[x], r1[x], r2[x], r3[x], r4[x])
            c0[x + 2], c1[x + 2], c2[x + 2], c3[x + 2], c4[x + 2] = v0, v1, v2, v3, v4
        for row in range(5):
            columns[row, 0] = columns[row, 1] = columns[row, 2]
            columns[row, width + 2] = columns[row, width + 3] = columns[row, width + 1]
        line = out[y]
        for x in range(width):
            # The compiler drops what is not used of the sorted rows.
            _, _, _, a, b = _sort5(c0[x], c0[x + 1], c0[x + 2], c0[x + 3], c0[x + 4])
            _, _, c, d, e = _sort5(c1[x], c1[x + 1], c1[x + 2], c1[x + 3], c1[x + 4])
            _, f, g, h, _ = _sort5(c2[x], c2[x + 1], c2[x + 2], c2[x + 3], c2[x + 4])
            i, j, k, _, _ = _sort5(c3[x], c3[x + 1], c3[x + 2], c3[x + 3], c3[x + 4])
            m, n, _, _, _ = _sort5(c4[x], c4[x + 1], c4[x + 2], c4[x + 3], c4[x + 4])
            line[x] = _middle13(a, b, c, d, e, f, g, h, i, j, k, m, n)


@compiled
def _primal_row(
    gx: Floats, gy: Floats, inverse: Floats, constant: Floats, u: Floats, v: Floats,
    p11: Floats, p12: Floats, p12_above: Floats, p21: Floats, p22: Floats, p22_above: Floats,
    squares: Floats, bound: float, theta: float,
) -> None:  # fmt: skip
    """Thresholding and primal update of one row; adds the squared change to `squares`, column by column."""
    limit, weight = np.float32(bound), np.float32(theta)
    for x in range(u.shape[0]):
        residual = constant[x] + gx[x] * u[x] + gy[x] * v[x]
        step = min(max(-residual * inverse[x], -limit), limit)
        du = step * gx[x] + weight * (p11[x + 1] - p11[x] + p12[x] - p12_above[x])
        dv = step * gy[x] + weight * (p21[x + 1] - p21[x] + p22[x] - p22_above[x])
        u[x] += du
        v[x] += dv
        squares[x] += du * du + dv * dv


@compiled
def _dual_row(u: Floats, u_below: Floats, px: Floats, py: Floats, step: float) -> None:
    """Dual update of one row for one component; px is shifted by one, px[0] stays 0."""
    s = np.float32(step)
    last = u.shape[0] - 1
    for x in range(last):
        dx, dy = s * (u[x + 1] - u[x]), s * (u_below[x] - u[x])
        shrink = F1 / (F1 + np.float32(math.sqrt(dx * dx + dy * dy)))
        px[x + 1] = (px[x + 1] + dx) * shrink
        py[x] = (py[x] + dy) * shrink
    dy = s * (u_below[last] - u[last])
    py[last] = (py[last] + dy) / (F1 + abs(dy))


@compiled
def iterate(
    data: Floats, flow: Floats, px: Floats, py: Floats, squares: Floats, bound: float, theta: float, step: float
) -> float:
    """One inner iteration over the whole picture; returns the sum of the squared change of the flow.

    The dual update of a row follows the primal update of the next row at once, while both are in the cache.
    px is [2, H, W + 1] with a first column of zeros, py is [2, H + 1, W] with a first row of zeros; squares [W] is
    scratch.
    """
    height = flow.shape[1]
    squares[:] = F0
    for y in range(height):
        _primal_row(
            data[0, y], data[1, y], data[2, y], data[3, y], flow[0, y], flow[1, y],
            px[0, y], py[0, y + 1], py[0, y], px[1, y], py[1, y + 1], py[1, y],
            squares, bound, theta,
        )  # fmt: skip
        if y > 0:
            _dual_row(flow[0, y - 1], flow[0, y], px[0, y - 1], py[0, y], step)
            _dual_row(flow[1, y - 1], flow[1, y], px[1, y - 1], py[1, y], step)
    # Below the last row lies the row itself: no vertical difference.
    y = height - 1
    _dual_row(flow[0, y], flow[0, y], px[0, y], py[0, y + 1], step)
    _dual_row(flow[1, y], flow[1, y], px[1, y], py[1, y + 1], step)
    change = 0.0
    for x in range(squares.shape[0]):
        change += squares[x]
    return change


@compiled
def refine(first: Floats, second: Floats, flow: Floats, settings: Reals, counts: Counts) -> None:
    """Improve the flow [2, H, W] at one level of the pyramid, in place.

    Args:
        first: [H, W].
        second: [H + 8, W + 8, 3] of :func:`with_gradient`.
        flow: initial flow, overwritten.
        settings: float64: lambda * theta, theta, tau / theta, epsilon.
        counts: int64: warps, outer iterations, inner iterations.
    """
    height, width = first.shape
    bound, theta, step = settings[0], settings[1], settings[2]
    enough = settings[3] * settings[3] * height * width
    data = np.empty((4, height, width), np.float32)
    px = np.zeros((2, height, width + 1), np.float32)
    py = np.zeros((2, height + 1, width), np.float32)
    smooth = np.empty((height, width), np.float32)
    columns = np.empty((5, width + 4), np.float32)
    squares = np.empty(width, np.float32)
    for _ in range(counts[0]):
        linearise(first, second, flow, data)
        change = 1e30
        for _ in range(counts[1]):
            if change <= enough:
                break
            for component in range(2):
                median5(flow[component], columns, smooth)
                flow[component] = smooth
            for _ in range(counts[2]):
                if change <= enough:
                    break
                change = iterate(data, flow, px, py, squares, bound, theta, step)
