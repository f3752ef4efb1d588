"""Optimizer, and the learning rate as a pure function of the step (so that it needs no state)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from rev2net.config import Config, OptimConfig, to_steps


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; no weight decay on biases and normalisations (tensors of one dimension)."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate over the run: linear warm-up, then cosine to 0, steps, or constant.

    Attributes:
        peak: rate at the end of the warm-up (after linear scaling with the global batch).
        warmup: steps of warm-up.
        total: steps of the run.
        kind: "cosine", "step" or "constant".
        milestones: steps at which "step" multiplies by `gamma`.
        gamma: that factor.
    """

    peak: float
    warmup: int
    total: int
    kind: str
    milestones: tuple[int, ...]
    gamma: float

    def rate(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "cosine":
            progress = (step - self.warmup) / max(1, self.total - self.warmup)
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        if self.kind == "step":
            return self.peak * self.gamma ** sum(step >= m for m in self.milestones)
        return self.peak


def build_schedule(config: Config, *, total: int, epoch_samples: int) -> Schedule:
    """The schedule of a run of `total` steps; `lr_batch` scales the rate linearly with the global batch."""
    optim, batch = config.optim, config.train.global_batch
    return Schedule(
        peak=optim.lr * (batch / optim.lr_batch if optim.lr_batch else 1.0),
        warmup=to_steps(optim.warmup, "optim.warmup", global_batch=batch, epoch_samples=epoch_samples),
        total=total,
        kind=optim.schedule,
        milestones=tuple(
            to_steps(m, "optim.milestones", global_batch=batch, epoch_samples=epoch_samples) for m in optim.milestones
        ),
        gamma=optim.gamma,
    )
