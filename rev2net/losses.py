"""The objective: of Rev2Net (paper, equations 1 to 3) and of the networks it is compared with. All in float32.

The paper does not say how the Frobenius norms are reduced. `frobenius` is the literal reading, one sample's
norm averaged over the batch; `rms` divides it by the square root of the number of elements. The weights mean
different things under the two: `benchmarks/accuracy.md` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rev2net.models.actionflownet import multiscale_epe
from rev2net.models.heads import Heads, Latent

Reduction = Literal["frobenius", "rms"]
KLReduction = Literal["sum", "mean"]
DDP = Literal["none", "low", "high", "both"]

TERMS = ("loss/ce", "loss/ddp_high", "loss/ddp_low", "loss/flow", "loss/frame", "loss/total")
"""Names of Rev2Net's scalars. All but the total are unweighted, and logged also where their weight is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Weights and reductions of equation 3.

    Attributes:
        ddp: which discrepancy penalties enter the loss. It changes the loss only, never the network.
        alpha: weight of the high-level penalty (paper: 0.01).
        beta: weight of the low-level penalty (paper: 0.1).
        lambda_flow: weight of the flow prediction (paper: 0.1).
        lambda_im: weight of the frame reconstruction (paper: 0.1).
        reduction: of the two reconstruction norms.
        ddp_low_reduction: of the low-level penalty's norms.
        ddp_high_reduction: of the divergence over one sample's latents.
    """

    ddp: DDP = "both"
    alpha: float = 0.01
    beta: float = 0.1
    lambda_flow: float = 0.1
    lambda_im: float = 0.1
    reduction: Reduction = "frobenius"
    ddp_low_reduction: Reduction = "rms"
    ddp_high_reduction: KLReduction = "sum"

    def __call__(self, output: Heads, label: Tensor, clip: Tensor, flow: Tensor | None) -> dict[str, Tensor]:
        """The scalars named in `TERMS`, as far as the network has the heads for them, and `loss/scales` of OFF.

        Args:
            output: what the network gave for `clip`.
            label: N, int64.
            clip: D C T H W in [-1, 1], of the decoded clips; the frame decoder's target is the same in reversed order.
            flow: D 2 T H W in units of 20 pixels, or None where there is no flow decoder.

        A term whose weight is zero, or that `ddp` leaves out, is measured without gradient and stays out of the
        graph. Its head has run all the same, so that every rank meets the same collectives.
        """
        total = F.cross_entropy(output.logits.float(), label)
        scalars = {"loss/ce": total}
        if output.scale_logits:  # each scale learns by itself; the sum of two is what is tested
            scalars["loss/ce"] = total.detach()
            total = torch.stack([F.cross_entropy(logits.float(), label) for logits in output.scale_logits]).sum()
            scalars["loss/scales"] = total
        for name, weight in self.weights().items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0.0):
                value = self._measure(name, output, clip, flow)
            if value is not None:
                scalars[name] = value
                total = total + weight * value if weight != 0.0 else total
        scalars["loss/total"] = total
        return scalars

    def weights(self) -> dict[str, float]:
        """The weight of each auxiliary term, 0 where `ddp` leaves it out."""
        return {
            "loss/ddp_high": self.alpha if self.ddp in ("high", "both") else 0.0,
            "loss/ddp_low": self.beta if self.ddp in ("low", "both") else 0.0,
            "loss/flow": self.lambda_flow,
            "loss/frame": self.lambda_im,
        }

    def _measure(self, name: str, output: Heads, clip: Tensor, flow: Tensor | None) -> Tensor | None:
        """One unweighted term, or None where the network lacks its head.

        The flow term is equation 3's norm for Rev2Net, the end-point error for a network with `flows`.
        """
        if name == "loss/flow":
            if flow is not None and output.flows:
                return multiscale_epe(output.flows, flow)
            return None if output.flow is None or flow is None else norm(output.flow - flow, self.reduction)
        if name == "loss/frame":
            return None if output.frames is None else norm(output.frames - clip.flip(2), self.reduction)
        if output.flow_latent is None or output.frame_latent is None:
            return None
        if name == "loss/ddp_high":
            return kl_divergence(output.flow_latent, output.frame_latent, self.ddp_high_reduction)
        return ddp_low(output, self.ddp_low_reduction)


def norm(difference: Tensor, reduction: Reduction) -> Tensor:
    """The Frobenius norm of each sample's difference (any shape N ...), averaged over the batch.

    `rms` divides it by the square root of a sample's number of elements. The gradient at zero is zero.
    """
    values = difference.float()
    if values.ndim == 5:
        # Flattened in the order of memory: otherwise the volume is copied and, worse, its gradient comes back in
        # another layout than the activations', which slows everything elementwise in the decoders' backward pass.
        channels_last = values.is_contiguous(memory_format=torch.channels_last_3d)
        values = (values.movedim(1, -1) if channels_last else values).flatten(3)
    # Rows first: a float32 sum over the millions of elements of a volume would lose digits. The gradient that
    # vector_norm has at zero is zero, of a row as of a sample.
    rows = torch.linalg.vector_norm(values, dim=-1)
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1)
    if reduction == "rms":
        norms = norms / difference[0].numel() ** 0.5
    return norms.mean()


def ddp_low(output: Heads, reduction: Reduction) -> Tensor:
    """Equation 1: the norms of f_D1 - f_D2, summed over the layers that have the same shape in both decoders.

    These are the three stages of the high-level parts and the first layer of the low-level parts.
    """
    pairs = zip(output.flow_features, output.frame_features, strict=True)
    return torch.stack([norm(f.float() - r.float(), reduction) for f, r in pairs]).sum()


def kl_divergence(first: Latent, second: Latent, reduction: KLReduction = "sum") -> Tensor:
    """Equation 2: KL(N(mu1, sigma1) || N(mu2, sigma2)) of diagonal Gaussians, closed form, averaged over the batch.

    `sum` adds over one sample's latents (nats), `mean` averages over them.
    """
    # In log form: no division by a variance that may be tiny.
    spread = torch.exp(first.logvar - second.logvar)
    distance = (first.mu - second.mu).square() * torch.exp(-second.logvar)
    elements = 0.5 * (second.logvar - first.logvar + spread + distance - 1.0)
    per_sample = elements.flatten(1).sum(1) if reduction == "sum" else elements.flatten(1).mean(1)
    return per_sample.mean()
