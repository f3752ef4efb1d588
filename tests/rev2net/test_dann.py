"""Domain-adversarial training: the reversed gradient, what each part learns, and the pairing of the two data sets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY
from tiny_data import make_dataset
from torch import nn
from torch.nn import functional as F

from dataloaders.errors import UserError
from dataloaders.shards import DataSet
from rev2net.config import Config, config_from_tree, load_config
from rev2net.data import open_target, train_loader
from rev2net.distributed import Ranks
from rev2net.engine import TrainingStep
from rev2net.models.build import build_network
from rev2net.models.dann import DomainDiscriminator, domain_loss, reversal_factor, reverse_gradient
from rev2net.train import TrainingRun


def test_the_gradient_is_reversed_and_scaled_and_the_value_is_not() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = reverse_gradient(x, 0.25)
    assert torch.equal(x, y)
    (3 * y).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, -0.75))


def test_the_factor_is_that_of_the_paper() -> None:
    """Ganin and Lempitsky, section 4.1: 2 / (1 + exp(-10 p)) - 1."""
    assert reversal_factor(0, 100) == 0
    for step, total in ((1, 10), (50, 100), (100, 100)):
        assert math.isclose(reversal_factor(step, total), 2 / (1 + math.exp(-10 * step / total)) - 1)
    assert reversal_factor(100, 100) > 0.9999


def test_source_and_target_count_one_half_each_whatever_their_numbers() -> None:
    logits = torch.tensor([-2.0, -1.0, 3.0, 1.0, -0.5, 2.0])
    loss, accuracy = domain_loss(logits, 2)
    source = F.softplus(logits[:2]).mean()  # -log(1 - sigmoid)
    target = F.softplus(-logits[2:]).mean()  # -log(sigmoid)
    assert torch.isclose(loss, (source + target) / 2)
    assert accuracy == (1.0 + 0.75) / 2


def test_discriminator_and_features_pull_in_opposite_directions() -> None:
    """One step of the discriminator alone lowers the domain loss, one of the features alone raises it."""
    torch.manual_seed(0)
    discriminator = DomainDiscriminator(8, 16)
    nn.init.normal_(discriminator.out.weight)
    features = torch.randn(12, 8, requires_grad=True)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return domain_loss(discriminator(values, 1.0), 6)[0]

    before = loss(features)
    before.backward()
    with torch.no_grad():
        assert loss(features - 1e-2 * features.grad / features.grad.norm()) > before
        for parameter in discriminator.parameters():
            parameter -= 1e-2 * parameter.grad
        assert loss(features) < before


def config(**more: object) -> Config:
    tree = {
        "output": "o",
        "data": {"path": "a", "frames": 8, "size": 32},
        "model": {"name": "i3d", "width": 0.125, "dropout": 0.0},
        "loss": {"ddp": "none"},
        "target": {"path": "b", "hidden": 16},
        "train": {"global_batch": 4, "micro_batch": 2},
        "loader": {"backend": "pyav"},
    }
    return config_from_tree({**tree, **more})


def test_the_labels_of_the_target_reach_nothing() -> None:
    """Its clips only enter the domain loss, and without reversal they leave the encoder's gradient as it is."""
    torch.manual_seed(0)
    network = build_network(config(), 4)
    # Statistics of the batch are shared by both domains: in evaluation mode nothing but the loss joins them.
    step = TrainingStep(network.eval(), config().loss.objective(), 0.3)
    source, target = torch.rand(2, 3, 8, 32, 32), torch.rand(2, 3, 8, 32, 32)
    label = torch.tensor([0, 3])
    with torch.no_grad():
        scalars = step(torch.cat([source, target]), None, label, torch.Generator())
    torch.testing.assert_close(scalars["loss/total"], scalars["loss/ce"] + 0.3 * scalars["loss/domain"])

    def gradients(*clips: torch.Tensor) -> dict[str, torch.Tensor]:
        network.zero_grad()
        step(torch.cat(clips), None, label, torch.Generator())[
            "loss/ce" if len(clips) == 1 else "loss/total"
        ].backward()
        return {n: p.grad.clone() for n, p in network.encoder.named_parameters()}

    alone, with_target = gradients(source), gradients(source, target)
    assert all(torch.allclose(alone[name], with_target[name], atol=1e-7) for name in alone)
    step.reversal = 1.0
    reversed_ = gradients(source, target)
    assert not torch.allclose(alone["Mixed_5c.b0.conv3d.weight"], reversed_["Mixed_5c.b0.conv3d.weight"], atol=1e-7)


def test_training_accuracy_is_that_of_the_labelled_clips() -> None:
    torch.manual_seed(0)
    network = build_network(config(), 4).eval()
    step = TrainingStep(network, config().loss.objective())
    clips = torch.rand(6, 3, 8, 32, 32)
    with torch.no_grad():
        label = network.encoder(clips[:4]).argmax(1)
        label[1] = (label[1] + 1) % 4
        assert step(clips, None, label, torch.Generator())["train/top1"] == 0.75


def test_decoders_may_learn_from_the_target() -> None:
    """Each of their losses is then the mean over both domains, and the label's loss is as it was."""
    torch.manual_seed(0)
    tree = config(model={"width": 0.125, "dropout": 0.0}, loss={"ddp": "both"}, target={"path": "b", "decode": True})
    network = build_network(tree, 4).eval()
    step = TrainingStep(network, tree.loss.objective(), 1.0)
    source, target = torch.rand(2, 3, 8, 32, 32), torch.rand(2, 3, 8, 32, 32)
    flows, label = torch.rand(4, 2, 8, 32, 32), torch.tensor([0, 3])
    with torch.no_grad():
        for weight in (network.flow_output.flow.weight, network.frame_output.up.weight):
            weight.normal_()  # they start at nothing: the same for every clip
        both = step(torch.cat([source, target]), flows, label, torch.Generator(), decode_all=True)
        one = step(torch.cat([source, target]), flows[:2], label, torch.Generator())
        other = step(torch.cat([target, source]), flows[2:], label, torch.Generator())
    assert both["loss/ce"] == one["loss/ce"] != other["loss/ce"]
    for name in ("loss/flow", "loss/frame", "loss/ddp_high", "loss/ddp_low"):
        assert one[name] != other[name]
        torch.testing.assert_close(both[name], (one[name] + other[name]) / 2, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSet, DataSet]:
    """Ten and six samples of the same classes."""
    folder = tmp_path_factory.mktemp("two")
    return make_dataset(folder / "a", shard_sizes=(4, 6)), make_dataset(folder / "b", shard_sizes=(6,))


def test_source_and_target_are_paired_on_every_number_of_ranks_and_after_a_resume(two: tuple[DataSet, DataSet]) -> None:
    """The pairs of clips of each step are the same, and the target's order is its own."""

    def pairs(world: int, start: int, steps: int) -> list[list[tuple[str, str]]]:
        found: list[list[tuple[str, str]]] = [[] for _ in range(steps)]
        for rank in range(world):
            ranks = Ranks(rank=rank, world_size=world, local_rank=rank, device=torch.device("cpu"))
            loaders = [train_loader(d, config(), ranks, start, of_target=d is two[1]) for d in two]
            for step in range(steps):
                for _ in range(4 // world // 2):
                    source, target = (next(loader) for loader in loaders)
                    assert len(source) == len(target) == 2
                    found[step] += zip(source.keys, target.keys, strict=True)
            for loader in loaders:
                loader.close()
        return found

    whole = pairs(1, 0, 6)
    assert pairs(2, 0, 6) == whole
    assert pairs(2, 4, 2) == whole[4:]
    assert len({pair for step in whole for pair in step}) > 15  # not the same partners epoch after epoch


@pytest.mark.parametrize("decode", [False, True])
def test_a_step_sees_the_source_with_its_labels_and_behind_it_the_target(
    decode: bool, tiny_data: Path, other_data: Path, tmp_path: Path
) -> None:
    """Each micro-batch with its own draws of what is random on the device."""
    words = [*TINY, f"data.path={tiny_data}", f"target.path={other_data}", f"output={tmp_path}/run", "data.size=32"]
    words += ["train.micro_batch=2", "train.global_batch=4", "target.hidden=16", "target.weight=0.3"]
    words += [f"target.decode={decode}", "loss.ddp_low_from=0", "tracking.enabled=false"]
    run = TrainingRun(load_config("configs/demo.yaml", words))
    assert run.engine.step_module.domain_weight == 0.3
    seen: list[tuple[Any, ...]] = []
    run.engine.step_module.register_forward_pre_hook(lambda _, given: seen.append(given))
    for _ in range(2):
        run.train_step()
    for loader in run.loaders:
        loader.close()
    run.engine.close()
    run.leave()
    sources = [DataSet.open(path) for path in (tiny_data, other_data)]
    loaders = [train_loader(d, run.config, run.ranks, 0, of_target=d is sources[1]) for d in sources]
    assert len(seen) == len({generator.initial_seed() for *_, generator in seen}) == 4
    for clip, flow, label, _ in seen:
        source, target = (next(loader) for loader in loaders)
        assert not set(source.keys) & set(target.keys)
        assert torch.equal(clip, torch.cat([source.video, target.video])) and torch.equal(label, source.label)
        assert torch.equal(flow, torch.cat([source.flow, target.flow]) if decode else source.flow)
    for loader in loaders:
        loader.close()


def test_p6_the_schedules_of_the_configuration_reach_every_step(tiny_data: Path, tmp_path: Path) -> None:
    """Of its own configuration, also after a resume, and so do the settings of the optimizer."""
    words = [*TINY, f"data.path={tiny_data}", f"target.path={tiny_data}", f"output={tmp_path}/run", "target.hidden=16"]
    words += ["data.size=32", "train.micro_batch=2", "train.global_batch=2", "tracking.enabled=false"]
    words += ["train.duration=4steps", "optim.schedule=constant", "optim.warmup=3steps", "optim.decoder_lr=4"]
    words += ["loss.ddp_low_from=1steps", "loss.fade_from=2steps", "loss.beta=1", "loss.lambda_im=1"]
    seen: list[tuple[float, float, float]] = []
    groups: list[set[tuple[float, float]]] = []
    others = ["optim.lr=0.6", "optim.weight_decay=0.2", "optim.betas=[0.5,0.6]", "optim.clip_grad_norm=0.5"]
    for first, more in ((0, ["optim.lr=0.3", "optim.weight_decay=0.1"]), (2, others)):
        run = TrainingRun(load_config("configs/demo.yaml", [*words, *more]))
        assert run.step == first
        optimizer = run.engine.torch_optimizer

        def look(step: TrainingStep, _: object, optimizer: torch.optim.Optimizer = optimizer) -> None:
            seen.append((step.objective.beta, step.objective.lambda_im, step.reversal))
            groups.append({(round(group["lr"], 6), group["weight_decay"]) for group in optimizer.param_groups})

        run.engine.step_module.register_forward_pre_hook(look)
        for _ in range(2):
            run.train_step()
        run.save()
        run.finish_saving()
        for loader in run.loaders:
            loader.close()
        run.engine.close()
        run.leave()
    assert seen == [(b, i, reversal_factor(n, 4)) for n, (b, i) in enumerate([(0, 1), (1, 1), (1, 1), (0.5, 0.5)])]
    expected = [(0.1, 0.1), (0.2, 0.1), (0.6, 0.2), (0.6, 0.2)]
    assert groups == [{(rate * f, d) for f in (1, 4) for d in (0, decay)} for rate, decay in expected]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}
    assert run.engine.deepspeed.optimizer.clip_grad == 0.5


def test_p12_a_target_that_does_not_fit_is_one_sentence(two: tuple[DataSet, DataSet], tmp_path: Path) -> None:
    target = {"path": str(two[1].folder), "val_split": "train"}
    assert open_target(config(target=target), two[0].classes) is not None
    assert open_target(config(target={}), two[0].classes) is None
    with pytest.raises(UserError, match=r"which differ in 'swim': prepare both with the same --class-map"):
        open_target(config(target=target), (*two[0].classes, "swim"))
    with pytest.raises(UserError, match=r"has no split 'test'"):
        open_target(config(target={**target, "val_split": "test"}), two[0].classes)
    plain = make_dataset(tmp_path, shard_sizes=(2,), flow_size=None)
    flow = {"model": {"name": "i3d", "input": "flow"}, "target": {**target, "path": str(plain.folder)}}
    with pytest.raises(UserError, match=r"without flow, which model\.input=flow needs"):
        open_target(config(**flow), plain.classes)
    decoded = {"model": {}, "loss": {}, "target": {**target, "path": str(plain.folder), "decode": True}}
    with pytest.raises(UserError, match=r"without flow, which the flow decoder of rev2net needs"):
        open_target(config(**decoded), plain.classes)
    with pytest.raises(UserError, match=r"target\.decode=true is for the decoders, but model\.name=i3d has none"):
        config(target={**target, "decode": True})
