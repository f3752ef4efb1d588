"""Flow as bytes: one 8-bit code per component, exact at zero, u and v stacked into one luma plane.

The quantisation is ``q = round(v * 127 / 20) + 128``: codes 1..255 stand for -20..+20 pixels in steps of 20/127
(0.157) pixel, 128 is exactly zero, and code 0 is never written. A video encoder may still return 0, which decodes to
just beyond the bound, -128 * 20 / 127 = -20.16 pixels. The bound of 20 pixels is the field's convention (two-stream
networks, I3D).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BOUND = 20.0
"""Largest magnitude of a flow component that is stored, in pixels."""

ZERO_CODE = 128
"""The code of a component that is exactly zero."""

LEVELS = 127
"""Codes on each side of zero."""


def encode_flow(flow: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Quantise flow into luma planes for a video encoder.

    Args:
        flow: float32 [T, 2, H, W], pixels, u (right) before v (down); values beyond +-20 are clipped.

    Returns:
        uint8 [T, 2H, W]: the plane of u on top, that of v below.

    Raises:
        ValueError: the array is not [T, 2, H, W], or holds values that are not finite.
    """
    if flow.ndim != 4 or flow.shape[1] != 2:
        raise ValueError(f"flow has shape {flow.shape}; expected [T, 2, H, W]")
    if not np.isfinite(flow).all():
        raise ValueError("flow holds values that are not finite")
    frames, _, height, width = flow.shape
    scaled = np.clip(flow, -BOUND, BOUND) * np.float32(LEVELS / BOUND)
    codes = (np.rint(scaled) + ZERO_CODE).astype(np.uint8)
    planes: npt.NDArray[np.uint8] = codes.reshape(frames, 2 * height, width)
    return planes


def decode_flow(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Invert :func:`encode_flow` up to its quantisation.

    Args:
        planes: uint8 [T, 2H, W], u on top and v below.

    Returns:
        float32 [T, 2, H, W], pixels.

    Raises:
        ValueError: the array is not uint8 [T, 2H, W] with an even number of rows.
    """
    if planes.ndim != 3 or planes.shape[1] % 2 or planes.dtype != np.uint8:
        raise ValueError(f"planes are {planes.dtype} {planes.shape}; expected uint8 [T, 2H, W]")
    frames, rows, width = planes.shape
    codes = planes.reshape(frames, 2, rows // 2, width).astype(np.float32)
    flow: npt.NDArray[np.float32] = (codes - np.float32(ZERO_CODE)) * np.float32(BOUND / LEVELS)
    return flow
