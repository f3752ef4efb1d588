"""What every network is for the training loop: an encoder that stays at test time, and heads for the objective."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rev2net.models.dann import DomainDiscriminator


@dataclass(frozen=True, slots=True)
class Latent:
    """A diagonal Gaussian over the volume of the encoder's `high` features (paper section 4.2).

    Attributes:
        mu: N x 128 x t x h x w, float32.
        logvar: the same shape, clamped to [-8, 8].
    """

    mu: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """mu + sigma * noise, the noise from `generator`."""
        noise = torch.randn(self.mu.shape, generator=generator, device=self.mu.device, dtype=self.mu.dtype)
        return self.mu + torch.exp(0.5 * self.logvar) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What one training step's forward pass gives to the objective. N counts the labelled clips, D those decoded.

    Attributes:
        logits: N x num_classes.
        pooled: what the domain discriminator reads, M x feature_channels; M counts the unlabelled clips too.
        flow: D 2 T H W, predicted flow in units of 20 pixels, or None without a flow decoder.
        frames: D 3 T H W in [-1, 1], the reconstruction of the clip in reversed order, or None.
        flow_latent, frame_latent: the Gaussians (mu1, sigma1) and (mu2, sigma2), or None.
        flow_features, frame_features: the decoders' hidden volumes, low resolution first, layer by layer of
            the same shape in both; empty without the decoder.
        flows: predicted flow at several sizes (D 2 t h w, coarse first); `flow` is the last of them,
            resized, in evaluation mode.
        scale_logits: logits (N x num_classes each) that have a cross-entropy of their own (OFF).
    """

    logits: Tensor
    pooled: Tensor
    flow: Tensor | None = None
    frames: Tensor | None = None
    flow_latent: Latent | None = None
    frame_latent: Latent | None = None
    flow_features: tuple[Tensor, ...] = ()
    frame_features: tuple[Tensor, ...] = ()
    flows: tuple[Tensor, ...] = ()
    scale_logits: tuple[Tensor, ...] = ()


class Network(nn.Module):
    """A network in training.

    Attributes:
        encoder: what is left at test time; called with a clip, N C T H W, it gives logits, N x num_classes.
        discriminator: present in domain-adversarial training.
    """

    encoder: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.discriminator: DomainDiscriminator | None = None

    def forward(self, clip: Tensor) -> Tensor:
        """N C T H W -> N x num_classes, by the encoder alone."""
        return self.encoder(clip)  # type: ignore[no-any-return]

    def heads(
        self,
        clip: Tensor,
        generator: torch.Generator | None = None,
        labelled: int | None = None,
        *,
        decode_all: bool = False,
    ) -> Heads:
        """Every head that was built, for the objective.

        Args:
            clip: M C T H W, the labelled clips first.
            generator: where dropout and latent noise draw from.
            labelled: how many are labelled, None for all; the others get no logits.
            decode_all: whether the decoders see the others too.
        """
        output = self._heads(clip, generator, None if decode_all else labelled)
        logits, scales = output.logits[:labelled], tuple(logits[:labelled] for logits in output.scale_logits)
        return replace(output, logits=logits, scale_logits=scales)

    def _heads(self, clip: Tensor, generator: torch.Generator | None, decoded: int | None) -> Heads:
        """The same with logits of all clips; the decoders see the first `decoded` ones, all where it is None."""
        raise NotImplementedError


class EncoderOnly(Network):
    """A network that learns from labels alone (TSN, TSM, STM, OFF)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def _heads(self, clip: Tensor, generator: torch.Generator | None, decoded: int | None) -> Heads:
        features = self.encoder.features(clip, generator)  # type: ignore[operator]
        scales = getattr(features, "scale_logits", ())
        return Heads(logits=features.logits, pooled=features.pooled, scale_logits=scales)
