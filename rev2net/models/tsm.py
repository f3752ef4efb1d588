"""TSM: temporal shift module (Lin et al., ICCV 2019; github: mit-han-lab/temporal-shift-module).

A TSN whose residual branches take a part of their channels from the neighbouring segments, at no multiplication
and no parameter. Offline, in both directions, before the first convolution of every residual block (section 3;
"blockres" in the published code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from rev2net.models.tsn import TSN, Backbone, SegmentResNet, by_clip

SHIFT_DIV = 8
"""An eighth of the channels moves in each direction (section 3.3)."""


def temporal_shift(images: Tensor, segments: int) -> Tensor:
    """(N*S) C H W -> (N*S) C H W with channels of the neighbouring segments of the same clip.

    The first C // SHIFT_DIV channels come from the next segment, as many after them from the previous one; zeros
    come in at the ends of a clip.
    """
    fold = images.shape[1] // SHIFT_DIV
    later, earlier, rest = torch.split(images, [fold, fold, images.shape[1] - 2 * fold], 1)
    # Written into zeros: padding along the segments, a fifth dimension, would lose channels_last.
    from_later, from_earlier = torch.zeros_like(later), torch.zeros_like(earlier)
    by_clip(from_later, segments)[:, :-1] = by_clip(later, segments)[:, 1:]
    by_clip(from_earlier, segments)[:, 1:] = by_clip(earlier, segments)[:, :-1]
    return torch.cat((from_later, from_earlier, rest), 1)


class ShiftBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's block of resnet18 with a temporal shift in its residual branch."""

    def forward(self, x: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) planes ceil(H/stride) ceil(W/stride)."""
        residual = self.relu(self.bn1(self.conv1(temporal_shift(x, segments))))
        residual = self.bn2(self.conv2(residual))
        residual += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(residual)
        return out


class ShiftBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's block of resnet50 with a temporal shift in its residual branch."""

    def forward(self, x: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) 4*planes ceil(H/stride) ceil(W/stride)."""
        residual = self.relu(self.bn1(self.conv1(temporal_shift(x, segments))))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        residual += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(residual)
        return out


class TSM(TSN):
    """TSM, called and built as `TSN`, with its parameters, keys and multiplications.

    The backbone's keys are torchvision's. The published files name the shifted convolutions `conv1.net.weight`
    where ours are `conv1.weight`.

    Raises:
        UserError: as `TSN`.
    """

    resnet: ClassVar[type[nn.Module]] = SegmentResNet
    blocks: ClassVar[Mapping[Backbone, type[nn.Module]]] = {"resnet18": ShiftBasicBlock, "resnet50": ShiftBottleneck}

    def pool(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) (stack*C) H W -> (N*S) x feature_channels; S is `segments`."""
        pooled: Tensor = self.backbone(images, segments)
        return pooled
