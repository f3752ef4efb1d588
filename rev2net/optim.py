"""Optimizer, and the learning rate as a pure function of the step (so that it needs no state)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from rev2net.config import Config, OptimConfig, to_steps
from rev2net.models.heads import Network


def build_optimizer(network: Network, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; no weight decay on biases and normalisations (tensors of one dimension).

    A group's `lr_factor` is what its rate is to be multiplied with: `optim.decoder_lr` for latents and decoders. The
    domain discriminator learns as fast as the encoder: one that runs ahead drowns the labels in its reversed gradient.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        factor = 1.0 if name.startswith(("encoder.", "discriminator.")) else config.decoder_lr
        group = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_factor": factor})
        group["params"].append(parameter)
    ordered = sorted(groups.values(), key=lambda group: (-group["weight_decay"], group["lr_factor"]))
    if config.name == "sgd":
        return torch.optim.SGD(ordered, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(ordered, lr=config.lr, betas=config.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate over the run: linear warm-up, then cosine to 0, steps, or constant.

    "wsd" (warm-up, stable, decay) is constant until the last third after the warm-up and falls linearly to 0 there.

    Attributes:
        peak: rate at the end of the warm-up (after linear scaling with the global batch).
        warmup: steps of warm-up.
        total: steps of the run.
        kind: "cosine", "wsd", "step" or "constant".
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
        if self.kind == "wsd":
            return self.peak * min(1.0, 3.0 * max(0, self.total - step) / max(1, self.total - self.warmup))
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


def growing(step: int, start: int) -> float:
    """0 before step `start` (counted from 0), then linearly up to 1 over as many steps again; 1 if `start` is 0."""
    return min(1.0, max(0.0, (step + 1 - start) / start)) if start else 1.0


def fading(step: int, start: int, total: int) -> float:
    """1 up to step `start` (counted from 0), then linearly down to the last step's 1 / (total - start)."""
    return min(1.0, (total - step) / (total - start)) if step > start else 1.0
