"""TSN: temporal segment networks (Wang et al., ECCV 2016; github: yjxiong/temporal-segment-networks).

An image network looks at every segment of a clip alone, and the segments' logits are averaged. The backbone is
torchvision's ResNet under torchvision's names, so that its weight files load by key. The networks in `tsm` and
`stm` let segments see each other inside the residual blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from dataloaders.errors import UserError
from rev2net.models.i3d import keyed_dropout

Backbone = Literal["resnet18", "resnet50"]

BLOCKS_PER_STAGE: dict[Backbone, list[int]] = {"resnet18": [2, 2, 2, 2], "resnet50": [3, 4, 6, 3]}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB in [0, 1], as torchvision's weights expect it."""

HEAD_STD = 0.001
"""Of the classifier's fresh weights, as in the published code."""


class Options(TypedDict, total=False):
    """What every network of images can be built with; see `TSN`."""

    stack: int
    backbone: Backbone
    dropout: float
    partial_bn: bool


class SegmentFeatures(NamedTuple):
    """What a segment network gives to a loss.

    Attributes:
        logits: N x num_classes, the consensus: the mean over the segments.
        pooled: N x feature_channels, the backbone's pooled features averaged over the segments, before dropout;
            float32.
    """

    logits: Tensor
    pooled: Tensor


def by_clip(images: Tensor, segments: int) -> Tensor:
    """(N*S) ... -> N S ..., a view; S is `segments`."""
    return images.view(-1, segments, *images.shape[1:])


class SegmentResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet with its keys, for blocks that are called with the number of segments of a clip too."""

    def forward(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) C H W -> (N*S) x feature_channels; S is `segments`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, segments)
        pooled: Tensor = self.fc(self.avgpool(x).flatten(1))
        return pooled


class TSN(nn.Module):
    """TSN, called with N C T H W, returns N x num_classes logits. It takes any number of segments, T / stack.

    On RGB with resnet50 and 400 classes: 24,327,632 parameters, 32.7 GMACs at 8x224x224.

    Args:
        num_classes: number of classes.
        in_channels: 3 for RGB, 2 for flow.
        stack: consecutive frames that one segment's image is made of: 1 for RGB, 5 for flow (section 3.2).
        backbone: torchvision's network of this name.
        dropout: probability before the classifier, drawn for each segment.
        partial_bn: in training all batch normalisations of the backbone but the first normalise by their running
            statistics, which stay as they are; scale and shift train on (section 3.2). For pretrained weights.

    Attributes:
        feature_channels: of the pooled features, 2048 for resnet50 and 512 for resnet18.
        backbone: torchvision's ResNet without `fc`; `conv1` takes in_channels * stack channels.
        head: the classifier of a segment.

    Raises:
        UserError: a backbone that this network cannot have.
    """

    resnet: ClassVar[type[nn.Module]] = ResNet
    blocks: ClassVar[Mapping[Backbone, type[nn.Module]]] = {"resnet18": BasicBlock, "resnet50": Bottleneck}

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        stack: int = 1,
        backbone: Backbone = "resnet50",
        dropout: float = 0.5,
        partial_bn: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in self.blocks:
            raise UserError(
                f"{type(self).__name__} was given the backbone {backbone!r}, but can have only"
                f" {' or '.join(self.blocks)}; choose {'one of these' if len(self.blocks) > 1 else 'this one'}."
            )
        self.in_channels = in_channels
        self.stack = stack
        self.dropout = dropout
        self.partial_bn = partial_bn
        trunk: ResNet = self.resnet(self.blocks[backbone], BLOCKS_PER_STAGE[backbone])
        if in_channels * stack != trunk.conv1.in_channels:
            trunk.conv1 = nn.Conv2d(in_channels * stack, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.feature_channels: int = trunk.fc.in_features
        trunk.fc = nn.Identity()
        self.backbone = trunk
        self.head = nn.Linear(self.feature_channels, num_classes)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        # From [-1, 1] to ImageNet's normalisation of [0, 1]; not persistent, so that checkpoints need not hold them.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.rgb_scale: Tensor
        self.rgb_shift: Tensor
        self.register_buffer("rgb_scale", 0.5 / std, persistent=False)
        self.register_buffer("rgb_shift", (0.5 - mean) / std, persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Training mode, with partial batch normalisation where it was asked for, or evaluation mode."""
        super().train(mode)
        if mode and self.partial_bn:
            norms = [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]
            for norm in norms[1:]:
                norm.eval()
        return self

    def images(self, clip: Tensor) -> Tensor:
        """The segments of all clips as images: N C T H W -> (N*S) (stack*C) H W with S = T / stack.

        RGB comes out in ImageNet's normalisation, flow as it is. Channels are frame by frame (u0 v0 u1 v1 ...).
        A clip in channels_last_3d gives images in channels_last: of flow with `stack` 1 a view, else a copy, which
        RGB's normalisation is anyway.

        Raises:
            UserError: T is not a multiple of `stack`.
        """
        frames = clip.shape[2]
        if frames % self.stack:
            raise UserError(
                f"The clip has {frames} frames, but each segment takes {self.stack} of them;"
                f" give clips whose number of frames is a multiple of {self.stack}."
            )
        channels_last = clip.is_contiguous(memory_format=torch.channels_last_3d)
        if self.in_channels == 3:
            clip = clip * self.rgb_scale + self.rgb_shift
        stacks = clip.view(*clip.shape[:2], frames // self.stack, self.stack, *clip.shape[3:])
        images = stacks.permute(0, 2, 3, 1, 4, 5).flatten(2, 3).flatten(0, 1)
        return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def pool(self, images: Tensor, segments: int) -> Tensor:
        """(N*S) (stack*C) H W -> (N*S) x feature_channels; where segments see each other S is needed."""
        pooled: Tensor = self.backbone(images)
        return pooled

    def features(self, clip: Tensor, generator: torch.Generator | None = None) -> SegmentFeatures:
        """Logits, and the features they stand on.

        Args:
            clip: N C T H W in [-1, 1]; T is a multiple of `stack`.
            generator: where dropout draws from; torch's global generator if None.

        Raises:
            UserError: as `images`.
        """
        segments = clip.shape[2] // self.stack
        pooled = self.pool(self.images(clip), segments)
        kept = keyed_dropout(pooled, self.dropout, generator) if self.training else pooled
        logits = by_clip(self.head(kept), segments).mean(1)
        return SegmentFeatures(logits, by_clip(pooled, segments).mean(1, dtype=torch.float32))

    def forward(self, clip: Tensor) -> Tensor:
        """N C T H W -> N x num_classes."""
        return self.features(clip).logits
