"""Learning rate as a function of the step, and the optimizer's parameter groups."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from rev2net.config import Config, LossConfig, config_from_tree
from rev2net.models import I3D, Rev2Net
from rev2net.models.dann import DomainDiscriminator
from rev2net.optim import Schedule, build_optimizer, build_schedule, fading, growing


def configured(global_batch: int = 8, **optim: Any) -> Config:
    return config_from_tree(
        {
            "output": "o",
            "data": {"path": "d"},
            "optim": optim,
            "train": {"global_batch": global_batch, "micro_batch": 1},
        }
    )


def rates(config: Config, total: int, epoch_samples: int = 80) -> list[float]:
    schedule = build_schedule(config, total=total, epoch_samples=epoch_samples)
    return [schedule.rate(step) for step in range(total + 1)]


def test_the_warm_up_is_linear_and_ends_at_the_peak() -> None:
    values = rates(configured(lr=0.4, warmup="4steps", schedule="constant"), 10)
    assert values == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.4] * 7)
    assert rates(configured(lr=0.4, schedule="constant"), 3) == [0.4] * 4


def test_cosine_falls_from_the_peak_to_zero_after_the_warm_up() -> None:
    values = rates(configured(lr=2.0, warmup="10steps", schedule="cosine"), 110)
    assert values[9] == values[10] == 2.0
    assert values[60] == pytest.approx(1.0)
    assert values[35] == pytest.approx(1 + 0.5**0.5)
    assert values[110] == pytest.approx(0, abs=1e-12)
    assert 0 < values[109] < 1e-3
    assert all(a > b for a, b in pairwise(values[10:]))
    beyond = Schedule(peak=2.0, warmup=0, total=10, kind="cosine", milestones=(), gamma=0.1)
    assert beyond.rate(1000) == pytest.approx(0, abs=1e-12)


def test_wsd_is_constant_and_falls_linearly_over_the_last_third() -> None:
    values = rates(configured(lr=2.0, warmup="10steps", schedule="wsd"), 100)
    assert values[9:71] == [2.0] * 62
    assert values[71:] == pytest.approx([2.0 * left / 30 for left in range(29, -1, -1)])
    assert Schedule(peak=2.0, warmup=0, total=10, kind="wsd", milestones=(), gamma=0.1).rate(1000) == 0


def test_steps_drop_at_the_milestones_in_any_unit() -> None:
    config = configured(lr=1.0, schedule="step", milestones=["2epochs", "240samples"], gamma=0.5)  # 10 steps an epoch
    values = rates(config, 40)
    assert values == [1.0] * 20 + [0.5] * 10 + [0.25] * 11


def test_linear_scaling_multiplies_the_rate_with_the_global_batch() -> None:
    for batch, factor in ((16, 0.25), (64, 1), (512, 8)):
        config = configured(batch, lr=0.1, lr_batch=64, schedule="constant", warmup="5steps")
        assert rates(config, 10)[-1] == pytest.approx(0.1 * factor)
        assert rates(configured(batch, lr=0.1, schedule="constant"), 10)[-1] == 0.1


def test_the_warm_up_counts_epochs_in_samples() -> None:
    schedule = build_schedule(configured(warmup="1.5epochs"), total=100, epoch_samples=81)
    assert schedule.warmup == 16  # 121.5 samples in batches of 8


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_weight_decay_on_biases_and_normalisations(name: str) -> None:
    network = Rev2Net(I3D(4, width=0.03125), (8, 32, 32))
    network.encoder.Conv3d_1a_7x7.conv3d.weight.requires_grad_(False)
    optimizer = build_optimizer(network, configured(name=name, weight_decay=0.05, momentum=0.8, lr=0.3).optim)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in network.named_parameters()}
    assert all(p.ndim == 5 for p in decayed["params"])
    assert all(names[id(p)].endswith((".bias", "bn.weight")) for p in plain["params"])
    covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(covered) == len(set(covered))
    assert set(covered) == {id(p) for p in network.parameters() if p.requires_grad}
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    assert isinstance(optimizer, kind)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.3
        assert group.get("momentum", 0.8) == 0.8


def test_the_decoders_may_learn_at_a_rate_of_their_own() -> None:
    network = Rev2Net(I3D(4, width=0.03125), (8, 32, 32))
    network.discriminator = DomainDiscriminator(8, 4)
    optimizer = build_optimizer(network, configured(decoder_lr=3.0, weight_decay=0.01).optim)
    names = {id(p): n for n, p in network.named_parameters()}
    found = {names[id(p)]: g["lr_factor"] for g in optimizer.param_groups for p in g["params"]}
    assert found == {n: 1.0 if n.startswith(("encoder.", "discriminator.")) else 3.0 for n in names.values()}
    assert len(optimizer.param_groups) == 4


def test_a_penalty_waits_and_then_grows_over_as_long_again() -> None:
    assert [growing(step, 4) for step in range(10)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert growing(0, 0) == 1


def test_what_fades_reaches_nothing_after_the_last_step() -> None:
    assert [fading(step, 4, 8) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [fading(step, 8, 8) for step in range(8)] == [1] * 8


def test_shares_multiply_the_weights_of_the_loss() -> None:
    halved = LossConfig(alpha=0.01, beta=0.1, lambda_flow=0.2, lambda_im=0.4).objective(ddp_low=0.5, auxiliary=0.5)
    assert (halved.alpha, halved.beta, halved.lambda_flow, halved.lambda_im) == (0.005, 0.025, 0.1, 0.2)
