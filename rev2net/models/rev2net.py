"""Rev2Net: an encoder with a flow decoder and a reversed-frame decoder (paper sections 4.1 and 4.2, figure 3).

Only the encoder is left at test time; everything else in this file exists during training alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rev2net.models.heads import Heads, Latent, Network
from rev2net.models.i3d import BN_EPS, BN_MOMENTUM, I3D, Size3

HIDDEN = 32
"""Channels of hidden decoder layers: the paper wants the decoders weak, so that the encoder has to learn."""

Skip = Literal["both", "flow", "frame", "none"]
"""The decoders that read the encoder's low-level volume, Conv3d_2c, beside their latents."""

LATENT = 128
"""Channels of each latent volume."""

LOGVAR_RANGE = (-8.0, 8.0)

MASK_BIAS = 4.0
"""Where the mask starts, before its sigmoid: 0.98 of the foreground."""


def _triple(values: Iterable[int]) -> Size3:
    t, h, w = values
    return t, h, w


def ceil_div(size: Size3, stride: Size3) -> Size3:
    """Size of a feature volume: SAME padding gives ceil(size / stride) on every axis."""
    return _triple(-(-s // k) for s, k in zip(size, stride, strict=True))


class UpConv3d(nn.ConvTranspose3d):
    """Transposed convolution, kernel 3, from a volume of one given size to one of another.

    The stride of an axis is 2 where it grows and 1 where it does not; the output padding is what is missing
    to the target (4 -> 7 needs none, 7 -> 14 one).

    Raises:
        ValueError: the sizes are not those of neighbouring stages.
    """

    def __init__(self, in_channels: int, out_channels: int, source: Size3, target: Size3, *, bias: bool) -> None:
        stride: Size3 = _triple(1 if a == b else 2 for a, b in zip(source, target, strict=True))
        missing: Size3 = _triple(b - ((a - 1) * s + 1) for a, b, s in zip(source, target, stride, strict=True))
        if not all(0 <= m < s for m, s in zip(missing, stride, strict=True)):
            raise ValueError(f"cannot grow a volume of {source} to {target} in one stage of stride at most 2")
        super().__init__(in_channels, out_channels, 3, stride, padding=1, output_padding=missing, bias=bias)


class NormReLU(nn.Module):
    """Batch normalisation (eps 1e-3) and ReLU, after every hidden layer of the decoders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm3d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """N C T H W -> the same."""
        return F.relu(self.bn(x), inplace=True)


class Latents(nn.Module):
    """From the encoder's `high` volume to one Gaussian: a 1x1x1 convolution each for mu and logvar."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mu = nn.Conv3d(channels, LATENT, 1)
        self.logvar = nn.Conv3d(channels, LATENT, 1)

    def forward(self, high: Tensor) -> tuple[Tensor, Tensor]:
        """N C t h w -> mu and logvar of N 128 t h w, in float32 whatever the autocast type.

        A plain tuple: ZeRO-3 looks into what a module returns, and cannot look into a dataclass.
        """
        return self.mu(high).float(), self.logvar(high).float().clamp(*LOGVAR_RANGE)


class HighDecoder(nn.Module):
    """The high-level part of a decoder: three transposed convolutions from the latents to the `low` volume."""

    def __init__(self, sizes: tuple[Size3, Size3, Size3, Size3], hidden: int) -> None:
        super().__init__()
        channels = (LATENT, hidden, hidden, hidden)
        self.up = nn.ModuleList(
            UpConv3d(channels[i], channels[i + 1], sizes[i], sizes[i + 1], bias=False) for i in range(3)
        )
        self.norm = nn.ModuleList(NormReLU(hidden) for _ in range(3))

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """N 128 t h w -> the three stages, the last of the size of `low` (N `hidden` T/2 H/4 W/4)."""
        stages = []
        for up, norm in zip(self.up, self.norm, strict=True):
            z = norm(up(z))
            stages.append(z)
        return tuple(stages)


class FlowOutput(nn.Module):
    """Second low-level layer of the flow decoder: N `hidden` T/2 H/2 W/2 -> N 2 T H W."""

    def __init__(self, hidden: int, source: Size3, clip: Size3) -> None:
        super().__init__()
        self.flow = UpConv3d(hidden, 2, source, clip, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Predicted flow in units of 20 pixels, not bounded."""
        return self.flow(x).float()  # type: ignore[no-any-return]


class FrameOutput(nn.Module):
    """Last layers of the frame decoder: foreground, mask and background, composed (Vondrick et al. 2016).

    m * foreground + (1 - m) * background, the background being one picture for the whole clip. Foreground and
    mask read the same volume and are computed in one call: channels 0-2 of `up` are the foreground's
    transposed convolution, channel 3 the mask's.
    """

    def __init__(self, hidden: int, source: Size3, clip: Size3) -> None:
        super().__init__()
        self.clip = clip
        self.up = UpConv3d(hidden, 4, source, clip, bias=True)
        self.background = nn.Conv3d(hidden, 3, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """N `hidden` T/2 H/2 W/2 -> N 3 T H W in [-1, 1]."""
        # Plane by plane in memory: in channels_last the slices have no run longer than 3 elements.
        up = self.up(x).to(torch.float32, memory_format=torch.contiguous_format)
        foreground, mask = up.split((3, 1), 1)
        # Seen with its channels last the mean reads memory in order (a third of the time on a CPU).
        mean = x.movedim(1, -1).mean(1, keepdim=True, dtype=torch.float32).movedim(-1, 1)
        background = torch.tanh(self.background(mean).float())
        background = F.interpolate(background.squeeze(2), self.clip[1:], mode="bilinear", align_corners=False)
        return torch.lerp(background.unsqueeze(2), torch.tanh(foreground), torch.sigmoid(mask))


class Rev2Net(Network):
    """Rev2Net, for clips of one fixed size. Called with a clip it is its encoder: logits, N x num_classes.

    Args:
        encoder: the network that stays at test time (an `I3D`).
        clip: (T, H, W) of the training clips; the sizes of the decoders' stages follow from it.
        flow_decoder: learn to predict the optical flow.
        frame_decoder: learn to reconstruct the clip in reversed order.
        hidden: channels of the decoders' hidden layers.
        skip: the decoders that read the low-level volume, Conv3d_2c, beside their latents.
        noise: draw the latents in training; else the decoders get their means.

    Raises:
        ValueError: the clip's size does not fit the strides.
    """

    encoder: I3D

    def __init__(
        self,
        encoder: I3D,
        clip: Size3,
        *,
        flow_decoder: bool = True,
        frame_decoder: bool = True,
        hidden: int = HIDDEN,
        skip: Skip = "both",
        noise: bool = True,
    ) -> None:
        super().__init__()
        frames, height, width = clip
        if frames % 8 or frames < 8 or min(height, width) < 32 or height % 4 or width % 4:
            raise ValueError(
                f"a Rev2Net clip of {frames}x{height}x{width}: frames must be a multiple of 8, "
                "height and width multiples of 4 and at least 32"
            )
        self.encoder = encoder
        self.clip = clip
        low = ceil_div(clip, encoder.low_stride)
        high = ceil_div(clip, encoder.high_stride)
        stages = (high, ceil_div(clip, (4, 16, 16)), ceil_div(clip, (2, 8, 8)), low)
        half: Size3 = (low[0], low[1] * 2, low[2] * 2)
        self.hidden, self.noise = hidden, noise
        decoders = (("flow", flow_decoder), ("frame", frame_decoder))
        self.skips = tuple(name for name, on in decoders if on and skip in (name, "both"))
        if self.skips:
            # The convolution over [decoder's volume, Conv3d_2c] is the sum of one over each part, and the part
            # over Conv3d_2c, by far the larger, is one call for both decoders.
            self.skip = UpConv3d(encoder.low_channels, hidden * len(self.skips), low, half, bias=False)
        if flow_decoder:
            self.flow_latents = Latents(encoder.high_channels)
            self.flow_high = HighDecoder(stages, hidden)
            self.flow_low = UpConv3d(hidden, hidden, low, half, bias=False)
            self.flow_norm = NormReLU(hidden)
            self.flow_output = FlowOutput(hidden, half, clip)
        if frame_decoder:
            self.frame_latents = Latents(encoder.high_channels)
            self.frame_high = HighDecoder(stages, hidden)
            self.frame_low = UpConv3d(hidden, hidden, low, half, bias=False)
            self.frame_norm = NormReLU(hidden)
            self.frame_output = FrameOutput(hidden, half, clip)
        self.flow_decoder = flow_decoder
        self.frame_decoder = frame_decoder
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_children():
            if name == "encoder":
                continue
            for m in module.modules():
                if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)):
                    # Fan-in of a transposed convolution is counted over its input channels and the taps that
                    # reach one output element: 27 / (product of strides).
                    strides = math.prod(m.stride) if isinstance(m, nn.ConvTranspose3d) else 1
                    taps = m.weight[0, 0].numel() / strides
                    nn.init.normal_(m.weight, std=(1.0 / (m.in_channels * taps)) ** 0.5)
                    if m.bias is not None:
                        nn.init.zeros_(m.bias)
        # The outputs start as no motion and as mid gray: a random flow of full scale, twenty pixels, is so far from
        # any real one that a short training would do nothing but shrink it.
        if self.flow_decoder:
            nn.init.zeros_(self.flow_output.flow.weight)
        if self.frame_decoder:
            nn.init.zeros_(self.frame_output.up.weight)
            nn.init.zeros_(self.frame_output.background.weight)
            assert self.frame_output.up.bias is not None
            # Foreground first: it is the part that can say where things are when. With the background first, a short
            # training stays at the clip's mean frame.
            nn.init.constant_(self.frame_output.up.bias[3:], MASK_BIAS)
        for latents in (m for m in self.modules() if isinstance(m, Latents)):
            # Both Gaussians start near N(0, 1), hence near each other: their divergence, a sum over thousands of
            # latents, must not drown the other terms of the first steps.
            for conv in (latents.mu, latents.logvar):
                nn.init.normal_(conv.weight, std=0.1 / conv.in_channels**0.5)

    def _heads(self, clip: Tensor, generator: torch.Generator | None, decoded: int | None) -> Heads:
        # In evaluation mode, and without noise, the latent means are used.
        logits, pooled, low, high = self.encoder.features(clip, generator)
        low, high = low[:decoded], high[:decoded]
        flow = frames = flow_latent = frame_latent = None
        flow_features: tuple[Tensor, ...] = ()
        frame_features: tuple[Tensor, ...] = ()
        skips = dict(zip(self.skips, self.skip(low).split(self.hidden, 1), strict=True)) if self.skips else {}
        if self.flow_decoder:
            flow_latent = Latent(*self.flow_latents(high))
            stages = self.flow_high(self._draw(flow_latent, generator))
            shared = self.flow_norm(self.flow_low(stages[-1]) + skips.get("flow", 0.0))
            flow_features = (*stages, shared)
            flow = self.flow_output(shared)
        if self.frame_decoder:
            frame_latent = Latent(*self.frame_latents(high))
            stages = self.frame_high(self._draw(frame_latent, generator))
            shared = self.frame_norm(self.frame_low(stages[-1]) + skips.get("frame", 0.0))
            frame_features = (*stages, shared)
            frames = self.frame_output(shared)
        return Heads(
            logits=logits,
            pooled=pooled,
            flow=flow,
            frames=frames,
            flow_latent=flow_latent,
            frame_latent=frame_latent,
            flow_features=flow_features,
            frame_features=frame_features,
        )

    def _draw(self, latent: Latent, generator: torch.Generator | None) -> Tensor:
        return latent.sample(generator) if self.training and self.noise else latent.mu
