"""STM: spatiotemporal and motion encoding (Jiang et al., ICCV 2019, sections 3.1 to 3.3).

A TSN on ResNet-50 with two branches where each bottleneck had its 3x3 convolution: CSTM, a channel-wise
convolution along time before it, and CMM, differences between neighbouring segments' features; their sum goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from rev2net.models.tsn import TSN, Backbone, Options, SegmentResNet, by_clip

REDUCTION = 16
"""CMM works on a sixteenth of the channels (section 3.2)."""


class TemporalConv(nn.Conv2d):
    """Channel-wise convolution along time, kernel 3, zeros beyond the ends (CSTM's first half, section 3.1).

    It starts as in the paper (implementation details): a quarter of the channels at the previous segment ([1, 0, 0]),
    a quarter at the next ([0, 0, 1]), and the half between them at its own ([0, 1, 0]).
    """

    def __init__(self, channels: int) -> None:
        # Over time x place as over an image: the same as a Conv3d takes 8 to 40 times as long on a CPU.
        super().__init__(channels, channels, (3, 1), padding=(1, 0), groups=channels, bias=False)

    def reset_parameters(self) -> None:
        """The start that the paper gives."""
        quarter = self.out_channels // 4
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.weight[:quarter, :, 0] = 1.0
            self.weight[quarter : self.out_channels - quarter, :, 1] = 1.0
            self.weight[self.out_channels - quarter :, :, 2] = 1.0

    def forward(self, images: Tensor, segments: int) -> Tensor:  # type: ignore[override]
        """(N*S) C H W -> (N*S) C H W; S is `segments`."""
        planes = by_clip(images.flatten(2), segments).transpose(1, 2)
        return super().forward(planes).transpose(1, 2).reshape(images.shape)


class MotionModule(nn.Module):
    """CMM: what changes from each segment's features to the next (section 3.2).

    1x1 convolution to a sixteenth of the channels; a channel-wise 3x3 convolution of the next segment minus this
    segment, zero for the last; 1x1 convolution back. No convolution has a bias. It starts at random, with
    PyTorch's defaults. What the paper leaves open is as in its first author's code: batch normalisation after the
    reduction, and a 2x2 maximum at the end where the block has stride 2 (rounded up, as the convolution beside it).
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        reduced = channels // REDUCTION
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.norm = nn.BatchNorm2d(reduced)
        self.transform = nn.Conv2d(reduced, reduced, 3, padding=1, groups=reduced, bias=False)
        self.expand = nn.Conv2d(reduced, channels, 1, bias=False)
        self.pool = nn.MaxPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()

    def reset_parameters(self) -> None:
        """The convolutions at random."""
        for conv in (self.reduce, self.transform, self.expand):
            conv.reset_parameters()

    def differences(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) C/16 H W: transformed features of the next segment minus those of this one."""
        reduced = self.norm(self.reduce(images))
        transformed = self.transform(reduced)
        differences = torch.zeros_like(reduced)
        this, following = by_clip(reduced, segments)[:, :-1], by_clip(transformed, segments)[:, 1:]
        by_clip(differences, segments)[:, :-1] = following - this
        return differences

    def forward(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) C ceil(H/stride) ceil(W/stride)."""
        motion: Tensor = self.pool(self.expand(self.differences(images, segments)))
        return motion


class STMBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's bottleneck with its keys, `conv2` between CSTM's convolution along time and the sum with CMM.

    As in the first author's code CMM is added after the ReLU, so that `bn2` keeps the statistics of its weights.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *args: Any, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, stride, *args, **kwargs)
        self.temporal = TemporalConv(planes)
        self.motion = MotionModule(planes, stride)

    def forward(self, x: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) 4*planes ceil(H/stride) ceil(W/stride)."""
        entry = self.relu(self.bn1(self.conv1(x)))
        spatiotemporal = self.relu(self.bn2(self.conv2(self.temporal(entry, segments))))
        residual = self.bn3(self.conv3(spatiotemporal + self.motion(entry, segments)))
        residual += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(residual)
        return out


class STM(TSN):
    """STM, called and built as `TSN`; resnet50 only, whose keys stay torchvision's.

    On RGB with 400 classes: 24,498,740 parameters, 33.1 GMACs at 8x224x224; with the 174 classes of the paper's
    first data set 24.04 M parameters. The modules that STM adds to torchvision's, `temporal` and `motion`
    of each block, start anew beside ImageNet weights; `partial_bn` leaves the batch normalisations of `motion` in
    training mode, as they have no statistics yet.

    Raises:
        UserError: as `TSN`.
    """

    resnet: ClassVar[type[nn.Module]] = SegmentResNet
    blocks: ClassVar[Mapping[Backbone, type[nn.Module]]] = {"resnet50": STMBottleneck}

    def __init__(self, num_classes: int, in_channels: int = 3, **options: Unpack[Options]) -> None:
        super().__init__(num_classes, in_channels, **options)
        # torchvision's ResNet gave these convolutions, too, the start of convolutions before a ReLU.
        for module in self.backbone.modules():
            if isinstance(module, TemporalConv | MotionModule):
                module.reset_parameters()

    def train(self, mode: bool = True) -> Self:
        """As `TSN.train`."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, MotionModule):
                module.train(mode)
        return self

    def pool(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) (stack*C) H W -> (N*S) x feature_channels; S is `segments`."""
        pooled: Tensor = self.backbone(images, segments)
        return pooled
