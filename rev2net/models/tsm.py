"""TSM: temporal shift module (Lin et al., ICCV 2019; github: mit-han-lab/temporal-shift-module).

A TSN whose residual branches take a part of their channels from the neighbouring segments, at no multiplication
and no parameter. Offline, in both directions, before the first convolution of every residual block (section 3;
"blockres" in the published code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from dataloaders.errors import UserError
from rev2net.models.tsn import TSN, Backbone, Options, SegmentResNet, by_clip

SHIFT_DIV = 8
"""An eighth of the channels moves in each direction (section 3.3)."""


def temporal_shift(images: Tensor, segments: int, shift_div: int) -> Tensor:
    """(N*S) C H W -> (N*S) C H W with channels of the neighbouring segments of the same clip.

    The first C // shift_div channels come from the next segment, as many after them from the previous one; zeros
    come in at the ends of a clip. `shift_div` 0 shifts nothing.
    """
    if shift_div == 0:
        return images
    fold = images.shape[1] // shift_div
    later, earlier, rest = torch.split(images, [fold, fold, images.shape[1] - 2 * fold], 1)
    # Written into zeros: padding along the segments, a fifth dimension, would lose channels_last.
    from_later, from_earlier = torch.zeros_like(later), torch.zeros_like(earlier)
    by_clip(from_later, segments)[:, :-1] = by_clip(later, segments)[:, 1:]
    by_clip(from_earlier, segments)[:, 1:] = by_clip(earlier, segments)[:, :-1]
    return torch.cat((from_later, from_earlier, rest), 1)


class ShiftBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's block of resnet18 with a temporal shift in its residual branch."""

    shift_div = SHIFT_DIV

    def forward(self, x: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) planes H/stride W/stride."""
        residual = self.relu(self.bn1(self.conv1(temporal_shift(x, segments, self.shift_div))))
        residual = self.bn2(self.conv2(residual))
        residual += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(residual)
        return out


class ShiftBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's block of resnet50 with a temporal shift in its residual branch."""

    shift_div = SHIFT_DIV

    def forward(self, x: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) 4*planes H/stride W/stride."""
        residual = self.relu(self.bn1(self.conv1(temporal_shift(x, segments, self.shift_div))))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        residual += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(residual)
        return out


class TSM(TSN):
    """TSM, called and built as `TSN`, with its parameters, keys and multiplications.

    The backbone's keys are torchvision's. The published files name the shifted convolutions `conv1.net.weight`
    where ours are `conv1.weight`.

    Args:
        shift_div: 1 / shift_div of the channels moves in each direction; 0 for none, which makes it a TSN.

    Raises:
        UserError: as `TSN`, or more channels would move than there are.
    """

    resnet: ClassVar[type[nn.Module]] = SegmentResNet
    blocks: ClassVar[Mapping[Backbone, type[nn.Module]]] = {"resnet18": ShiftBasicBlock, "resnet50": ShiftBottleneck}

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, shift_div: int = SHIFT_DIV, **options: Unpack[Options]
    ) -> None:
        super().__init__(num_classes, in_channels, **options)
        if shift_div < 0 or shift_div == 1:
            raise UserError(
                f"shift_div is {shift_div}, but must be 0 (no shift) or at least 2, as 1/shift_div of the channels"
                f" moves in each direction; the published value is {SHIFT_DIV}."
            )
        for block in self.backbone.modules():
            if isinstance(block, ShiftBasicBlock | ShiftBottleneck):
                block.shift_div = shift_div

    def pool(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) (stack*C) H W -> (N*S) x feature_channels; S is `segments`."""
        pooled: Tensor = self.backbone(images, segments)
        return pooled
