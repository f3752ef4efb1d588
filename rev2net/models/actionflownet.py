"""ActionFlowNet: a 3D ResNet-18 that learns optical flow while it learns to classify (Ng et al., WACV 2018).

The encoder is torchvision's r3d_18. The decoder is that of FlowNetS (Dosovitskiy et al., ICCV 2015, section 3,
"Refinement") with a time axis; it exists during training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet

from rev2net.models.heads import Heads, Network
from rev2net.models.i3d import Size3, keyed_dropout, scale_channels
from rev2net.models.rev2net import NormReLU, UpConv3d, ceil_div

KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
KINETICS_STD = (0.22803, 0.22145, 0.216989)
"""Of RGB in [0, 1], per channel: what torchvision's r3d_18 was trained on."""

FLOW_STRIDES: tuple[Size3, ...] = ((8, 16, 16), (4, 8, 8), (2, 4, 4), (1, 2, 2))
"""Of the predicted flows, coarse first: the strides of layer4 to layer1."""

SCALE_WEIGHTS = (0.125, 0.125, 0.25, 0.5)
"""Of `multiscale_epe`, coarse first.

FlowNetS has the weights 0.005, 0.01, 0.02 and 0.08 from its finest scale on, for sums over the pixels (github:
ClementPinard/FlowNetPytorch, multiscaleloss.py), and a scale has a quarter of the pixels of the next finer one. For
means over the pixels that is 4 : 2 : 1 : 1, here with a sum of one.
"""


class R3DFeatures(NamedTuple):
    """What the encoder gives to the heads.

    Attributes:
        logits: N x num_classes.
        pooled: N x feature_channels, the mean over the last volume, before dropout.
        volumes: outputs of layer1 to layer4, strides (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16), the sizes
            rounded up.
    """

    logits: Tensor
    pooled: Tensor
    volumes: tuple[Tensor, ...]


class _Conv3d(nn.Conv3d):
    """A convolution with kernel 3 and padding 1 in time."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[2] == 2 and input.device.type == "cpu":
            # As in `SameConv3d`: of two frames that both need padding in time, oneDNN (bfloat16) leaves part of the
            # weight gradient uninitialised.
            stride: Size3 = self.stride  # type: ignore[assignment]
            padding: Size3 = self.padding  # type: ignore[assignment]
            return F.conv3d(F.pad(input, (0, 0, 0, 0, 1, 1)), self.weight, self.bias, stride, (0, *padding[1:]))
        return super().forward(input)


class _BlockConv3d(_Conv3d, Conv3DSimple):  # type: ignore[misc]
    """torchvision's, but for the above."""


class _Trunk(VideoResNet):  # type: ignore[misc]
    """torchvision's r3d_18 without its classifier, for any number of input channels and with scaled widths."""

    def __init__(self, in_channels: int, width: float) -> None:
        self.width = width
        super().__init__(BasicBlock, [_BlockConv3d] * 4, [2, 2, 2, 2], lambda: self._stem(in_channels))
        self.fc = nn.Identity()

    def _stem(self, in_channels: int) -> nn.Sequential:
        # The first block asks for its input's channels here; torchvision sets 64 just before it builds the stem.
        self.inplanes = scale_channels(64, self.width)
        conv = _Conv3d(in_channels, self.inplanes, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(self.inplanes), nn.ReLU(inplace=True))

    def _make_layer(self, block: type, conv_builder: type, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        planes = scale_channels(planes, self.width)
        return super()._make_layer(block, conv_builder, planes, blocks, stride)  # type: ignore[no-any-return]


class R3D18(nn.Module):
    """3D ResNet-18 (Tran et al., CVPR 2018, "R3D"), called with N C T H W in [-1, 1], returns N x num_classes logits.

    33,166,272 parameters without the classifier, 33,371,472 with 400 classes; 40.7 GMACs at 16x112x112, as
    torchvision publishes for r3d_18. Any clip size works. torchvision's keys are ours with `trunk.` before them,
    but for `fc.`, which is `head.` here.

    Args:
        num_classes: number of classes.
        in_channels: 3 for RGB, which is mapped to Kinetics' normalisation; 2 for flow, taken as it is.
        width: factor on every hidden channel count, for small runs.
        dropout: probability before the classifier.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 1.0, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.dropout = dropout
        self.channels = tuple(scale_channels(c, width) for c in (64, 128, 256, 512))
        self.feature_channels = self.channels[-1]
        self.trunk = _Trunk(in_channels, width)
        self.head = nn.Linear(self.feature_channels, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        if in_channels == 3:
            mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (KINETICS_MEAN, KINETICS_STD))
            self.register_buffer("scale", 0.5 / std, persistent=False)
            self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        """N C T H W -> N x num_classes."""
        return self.features(clip).logits

    def features(self, clip: Tensor, generator: torch.Generator | None = None) -> R3DFeatures:
        """Logits, pooled features and the volumes that the flow decoder stands on.

        Args:
            clip: N C T H W in [-1, 1].
            generator: where dropout draws from; torch's global generator if None.
        """
        x = clip * self.scale + self.shift if self.in_channels == 3 else clip
        x = self.trunk.stem(x)
        volumes = []
        for layer in (self.trunk.layer1, self.trunk.layer2, self.trunk.layer3, self.trunk.layer4):
            x = layer(x)
            volumes.append(x)
        pooled = self.trunk.avgpool(x).flatten(1)
        kept = keyed_dropout(pooled, self.dropout, generator) if self.training else pooled
        return R3DFeatures(self.head(kept), pooled, tuple(volumes))


class FlowDecoder(nn.Module):
    """Flow at the scale of every encoder volume, coarse to fine.

    At each scale a convolution predicts the flow from [up-convolved volume, encoder's volume, up-convolved coarser
    flow]; layer4's volume stands alone. The up-convolutions have 256, 128 and 64 channels, as the last three of
    FlowNetS have, with batch normalisation and ReLU in place of its leaky ReLU, as everywhere in the encoder, and
    kernels of 3 in place of 4, which meet odd sizes (7 -> 14, 25 -> 49).

    Args:
        channels: of the encoder's volumes, fine first.
        clip: (T, H, W).
    """

    def __init__(self, channels: Sequence[int], clip: Size3) -> None:
        super().__init__()
        skips = channels[::-1]
        sizes = [ceil_div(clip, stride) for stride in FLOW_STRIDES]
        inputs = [skips[0]] + [2 * c + 2 for c in skips[1:]]
        stages = range(len(skips) - 1)
        self.flow = nn.ModuleList(self._no_motion(c) for c in inputs)
        self.up = nn.ModuleList(UpConv3d(inputs[i], skips[i + 1], sizes[i], sizes[i + 1], bias=False) for i in stages)
        self.norm = nn.ModuleList(NormReLU(c) for c in skips[1:])
        self.up_flow = nn.ModuleList(UpConv3d(2, 2, sizes[i], sizes[i + 1], bias=False) for i in stages)

    @staticmethod
    def _no_motion(channels: int) -> nn.Conv3d:
        """A layer that predicts flow: none to start with.

        A random flow of full scale, twenty pixels, is so far from any real one that a short training would do
        nothing but shrink it.
        """
        conv = _Conv3d(channels, 2, 3, padding=1)
        nn.init.zeros_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        return conv

    def forward(self, volumes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The encoder's volumes, fine first -> flows, coarse first, in units of 20 pixels, float32, not bounded."""
        x = volumes[-1]
        flow = self.flow[0](x)
        flows = [flow.float()]
        skips = volumes[-2::-1]
        for up, norm, up_flow, predict, skip in zip(
            self.up, self.norm, self.up_flow, self.flow[1:], skips, strict=True
        ):
            x = torch.cat([norm(up(x)), skip, up_flow(flow)], 1)
            flow = predict(x)
            flows.append(flow.float())
        return tuple(flows)


class ActionFlowNet(Network):
    """ActionFlowNet, for clips of one fixed size. Called with a clip it is its encoder: logits, N x num_classes.

    39,210,208 parameters with 400 classes and 45.7 GMACs at 16x112x112, of which the encoder has 33,371,472 and 40.7.

    Args:
        encoder: the network that stays at test time.
        clip: (T, H, W) of the training clips; the sizes of the decoder's stages follow from it.
    """

    encoder: R3D18

    def __init__(self, encoder: R3D18, clip: Size3) -> None:
        super().__init__()
        self.encoder = encoder
        self.clip = clip
        self.decoder = FlowDecoder(encoder.channels, clip)

    def _heads(self, clip: Tensor, generator: torch.Generator | None, decoded: int | None) -> Heads:
        logits, pooled, volumes = self.encoder.features(clip, generator)
        flows = self.decoder(tuple(volume[:decoded] for volume in volumes))
        # Its loss has the flows as they are: the full size is for who looks at them.
        flow = None if self.training else F.interpolate(flows[-1], self.clip, mode="trilinear", align_corners=False)
        return Heads(logits=logits, pooled=pooled, flow=flow, flows=flows)


def multiscale_epe(flows: Sequence[Tensor], target: Tensor, weights: Sequence[float] = SCALE_WEIGHTS) -> Tensor:
    """End-point error (Ng et al. 2018; FlowNet), averaged over batch, frames and pixels, summed over the scales.

    The weights of all scales sum to one by default: the loss is a distance in units of 20 pixels. Where prediction
    and target are equal its gradient is zero.

    Args:
        flows: predictions, coarse first, each N 2 t h w in units of 20 pixels of the full clip.
        target: N 2 T H W in the same units; averaged in time and space to the size of each prediction.
        weights: of the scales, coarse first.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: not as many weights as flows.
    """
    target = target.float()
    loss = target.new_zeros(())
    for flow, weight in zip(flows, weights, strict=True):
        scaled = F.adaptive_avg_pool3d(target, (flow.shape[2], flow.shape[3], flow.shape[4]))
        loss = loss + weight * torch.linalg.vector_norm(flow.float() - scaled, dim=1).mean()
    return loss
