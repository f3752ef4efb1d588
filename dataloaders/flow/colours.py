"""Optical flow as colours."""

from __future__ import annotations

import torch


def flow_colours(flow: torch.Tensor, fastest: float) -> torch.Tensor:
    """The usual colour wheel: hue is direction, saturation speed, the same in every picture of one `fastest`.

    Args:
        flow: [2, H, W], u before v.
        fastest: the speed that has the full colour, as have all above it; in the unit of the flow.

    Returns:
        uint8 [3, H, W], RGB.
    """
    from torchvision.utils import flow_to_image  # slow to import, and every command imports this package

    flow = flow.float() / fastest
    flow = flow / flow.norm(dim=0, keepdim=True).clamp_min(1.0)
    # flow_to_image scales by the largest vector: a row more, cut off again, holds one of length 1.
    ruler = flow.new_zeros(2, 1, flow.shape[2])
    ruler[0] = 1.0
    colours: torch.Tensor = flow_to_image(torch.cat([flow, ruler], 1))[:, :-1]
    return colours
