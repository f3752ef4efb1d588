"""OFF: optical flow guided features (Sun et al., CVPR 2018; github: kevin-ssy/Optical-Flow-Guided-Feature).

Where brightness is constant, (gradient in x, in y, in time) is orthogonal to (u, v, 1): the gradients of feature
maps guide to the flow without computing it (section 3). A TSN makes the feature maps, on ResNet instead of the
paper's BN-Inception; a small residual network reads their gradients from fine to coarse (section 4.1).
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from dataloaders.errors import UserError
from rev2net.models.i3d import keyed_dropout
from rev2net.models.tsn import HEAD_STD, TSN, Options, by_clip

TEMPORAL_CHANNELS, SPATIAL_CHANNELS = 128, 32
"""What a unit reduces the feature maps to before it takes their gradients in time and in space (published code)."""


class Level(NamedTuple):
    """One resolution of the OFF sub-network, as in the published code.

    Attributes:
        kernel, stride: of the convolution that takes up the gradients and the level before.
        channels: of that convolution and inside the residual blocks after it, which put out four times as many.
        blocks: how many residual blocks.
    """

    kernel: int
    stride: int
    channels: int
    blocks: int


LEVELS = (Level(7, 2, 64, 3), Level(5, 2, 128, 2), Level(3, 1, 256, 1))
"""For gradients at 1/8, 1/16 and 1/32 of the image (28, 14 and 7 pixels of 224): layer2, layer3, layer4 of a ResNet."""


class OFFFeatures(NamedTuple):
    """What OFF gives to a loss.

    Attributes:
        logits: N x num_classes, the sum of the feature network's logits and the last level's.
        pooled: N x feature_channels, what these logits stand on: the pooled features of the feature network
            averaged over the segments, then those of the last level averaged over the pairs; before dropout, float32.
        scale_logits: N x num_classes each, which have a cross-entropy of their own: the feature network's, then
            those of every level, fine first; each the mean over segments or pairs.
    """

    logits: Tensor
    pooled: Tensor
    scale_logits: tuple[Tensor, ...]


class OFFUnit(nn.Module):
    """The gradients of feature maps in space and time, after 1x1 convolutions to fewer channels (section 4.1)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.temporal = nn.Conv2d(in_channels, TEMPORAL_CHANNELS, 1)
        # Without bias: of a constant only the border would show in the gradient.
        self.spatial = nn.Conv2d(in_channels, SPATIAL_CHANNELS, 1, bias=False)
        self.out_channels = TEMPORAL_CHANNELS + 2 * SPATIAL_CHANNELS
        along_x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        pair = torch.stack((along_x, along_x.T)).unsqueeze(1)
        self.sobel: Tensor
        self.register_buffer("sobel", pair.repeat(SPATIAL_CHANNELS, 1, 1, 1), persistent=False)

    def gradients(self, maps: Tensor) -> Tensor:
        """Sobel's d/dx and d/dy per pixel, channel by channel: M 32 H W -> M 64 H W (x, y, x, y, ...); 0 outside."""
        return F.conv2d(maps, self.sobel, padding=1, groups=SPATIAL_CHANNELS)

    def differences(self, maps: Tensor, segments: int) -> Tensor:
        """The next segment's maps minus this one's, (N*S) C H W -> (N*(S-1)) C H W; S is `segments`."""
        clips = by_clip(maps, segments)
        return (clips[:, 1:] - clips[:, :-1]).flatten(0, 1)

    def forward(self, maps: Tensor, segments: int) -> Tensor:
        """For every pair of neighbouring segments, (N*S) C H W -> (N*(S-1)) out_channels H W; S is `segments`.

        The gradients in space, of the first of the pair, come before those in time.
        """
        spatial = by_clip(self.gradients(self.spatial(maps)), segments)[:, :-1].flatten(0, 1)
        temporal = self.differences(F.relu(self.temporal(maps)), segments)
        both = torch.cat((spatial, temporal), 1)
        # Leaving out the last segment gave up channels_last, in which convolutions are faster.
        channels_last = maps.is_contiguous(memory_format=torch.channels_last)
        return both.contiguous(memory_format=torch.channels_last) if channels_last else both


def residual_blocks(in_channels: int, level: Level) -> nn.Sequential:
    """One level of the OFF sub-network: M in_channels H W -> M (4*channels) ceil(H/stride) ceil(W/stride)."""
    channels, width = level.channels, level.channels * Bottleneck.expansion
    shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, level.kernel, level.stride, level.kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        Bottleneck(channels, channels, downsample=shortcut),
        *(Bottleneck(width, channels) for _ in range(level.blocks - 1)),
    )


class OFF(TSN):
    """OFF, called and built as `TSN`; it takes two segments or more. The keys of `backbone` stay torchvision's.

    On RGB with resnet50 and 400 classes: 31,256,192 parameters, 36.4 GMACs at 8x224x224 (32.7 of them TSN's).

    At each level the gradients of neighbouring segments and the output of the level before, joined, pass through
    residual blocks; a classifier of its own follows, and its logits are averaged over the pairs. The paper tests
    with the sum of the feature network's scores and the last level's (section 4.3), which are the logits here.

    The paper trains the feature network first and then, with it frozen, the OFF sub-network (section 4.2). Here both
    learn together from ImageNet weights, every set of `scale_logits` by a cross-entropy of its own, all of weight 1.
    Other than in the published code there is one unit per resolution; the spatial gradients are along x and y
    apart, without dropout, and taken of flow too; convolutions have batch normalisation, which `partial_bn` leaves in
    training mode outside the backbone.

    Attributes:
        feature_channels: of the pooled features, 1024 more than the backbone's.

    Raises:
        UserError: as `TSN`.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **options: Unpack[Options]) -> None:
        super().__init__(num_classes, in_channels, **options)
        self.units, self.levels, self.level_heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = 0
        deepest = self.feature_channels
        for level, maps in zip(LEVELS, (deepest // 4, deepest // 2, deepest), strict=True):
            unit = OFFUnit(maps)
            self.units.append(unit)
            self.levels.append(residual_blocks(unit.out_channels + before, level))
            before = level.channels * Bottleneck.expansion
            self.level_heads.append(nn.Linear(before, num_classes))
        self.feature_channels = deepest + before
        self._initialise()

    def _initialise(self) -> None:
        for module in (*self.units.modules(), *self.levels.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in self.level_heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=HEAD_STD)
            nn.init.zeros_(head.bias)

    def stages(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps that the units stand on: (N*S) (stack*C) H W -> (N*S) C' h w, of layer2, layer3 and layer4."""
        trunk = self.backbone
        fine = trunk.layer1(trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images)))))
        second = trunk.layer2(fine)
        third = trunk.layer3(second)
        return second, third, trunk.layer4(third)

    def features(  # type: ignore[override]
        self, clip: Tensor, generator: torch.Generator | None = None
    ) -> OFFFeatures:
        """Logits, the features they stand on, and the logits of every scale.

        Args:
            clip: N C T H W in [-1, 1]; T is a multiple of `stack`, at least twice as large.
            generator: where dropout draws from; torch's global generator if None.

        Raises:
            UserError: as `images`, or the clip has one segment only.
        """
        segments = clip.shape[2] // self.stack
        if segments == 1:
            raise UserError(
                f"The clip has one segment only ({clip.shape[2]} frames), but OFF compares neighbouring segments;"
                f" give clips of at least {2 * self.stack} frames."
            )
        stages = self.stages(self.images(clip))
        pooled = [self.backbone.avgpool(stages[-1]).flatten(1)]
        maps: Tensor | None = None
        for stage, unit, level in zip(stages, self.units, self.levels, strict=True):
            gradients = unit(stage, segments)
            maps = level(gradients if maps is None else torch.cat((gradients, maps), 1))
            pooled.append(maps.mean((2, 3)))
        parts = (segments, *[segments - 1] * len(LEVELS))
        scale_logits = tuple(
            self._consensus(head, values, count, generator)
            for head, values, count in zip((self.head, *self.level_heads), pooled, parts, strict=True)
        )
        ends = [by_clip(pooled[i], parts[i]).mean(1, dtype=torch.float32) for i in (0, -1)]
        return OFFFeatures(scale_logits[0] + scale_logits[-1], torch.cat(ends, 1), scale_logits)

    def _consensus(self, head: nn.Module, pooled: Tensor, parts: int, generator: torch.Generator | None) -> Tensor:
        """(N*parts) C -> N x num_classes: dropout, classifier, mean over the parts."""
        kept = keyed_dropout(pooled, self.dropout, generator) if self.training else pooled
        return by_clip(head(kept), parts).mean(1)
