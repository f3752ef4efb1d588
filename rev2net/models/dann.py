"""Domain-adversarial training (DANN): Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation"."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -factor (section 3.1 of DANN's paper)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`; what flows back through it is reversed and multiplied by `factor`."""
    return _ReverseGradient.apply(x, factor)  # type: ignore[no-any-return]


def reversal_factor(step: int, total: int) -> float:
    """2 / (1 + exp(-10 p)) - 1, p the share of the run that is over: from 0, while features mean nothing, to 1."""
    return 2.0 / (1.0 + math.exp(-10.0 * step / max(1, total))) - 1.0


class DomainDiscriminator(nn.Module):
    """Tells target features from source features: two hidden layers and one logit, as in DANN's object networks.

    Args:
        channels: of the features.
        hidden: width of the hidden layers.
    """

    def __init__(self, channels: int, hidden: int = 1024) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(channels, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def forward(self, pooled: Tensor, factor: float) -> Tensor:
        """M x channels -> M logits, positive for the target; the features get the reversed gradient."""
        x = reverse_gradient(pooled, factor)
        x = F.relu(self.hidden2(F.relu(self.hidden1(x))))
        return self.out(x).squeeze(1)  # type: ignore[no-any-return]


def domain_loss(logits: Tensor, source: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of a discriminator's logits, source and target counting one half each.

    Args:
        logits: M, of which the first `source` are of source clips and the others of target clips.
    """
    logits = logits.float()
    is_target = (torch.arange(len(logits), device=logits.device) >= source).float()
    losses = F.binary_cross_entropy_with_logits(logits, is_target, reduction="none")
    right = ((logits > 0) == (is_target > 0)).float()
    halves = [0.5 * (values[:source].mean() + values[source:].mean()) for values in (losses, right)]
    return halves[0], halves[1]
