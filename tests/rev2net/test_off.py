"""OFF: counts, gradients in space and time, levels from fine to coarse, the logits of every scale."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

from dataloaders.errors import UserError
from rev2net.models.off import OFF, OFFUnit
from rev2net.models.tsn import TSN, Backbone


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@cache
def lively() -> OFF:
    """For tests that change nothing: in evaluation mode, with statistics and classifiers that show differences."""
    torch.manual_seed(7)
    model = OFF(3, backbone="resnet18")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    for head in (model.head, *model.level_heads):
        assert isinstance(head, nn.Linear)
        nn.init.normal_(head.weight, std=0.1)
        nn.init.normal_(head.bias)
    return model.eval()


@pytest.mark.parametrize(
    ("channels", "stack", "backbone", "whole", "added", "gmacs"),
    [
        (3, 1, "resnet50", 31_256_192, 6_928_560, 36.38),
        (2, 5, "resnet50", 31_278_144, 6_928_560, 38.58),
        (3, 1, "resnet18", 17_880_192, 6_498_480, 17.51),
    ],
)
def test_parameters_and_multiplications_of_eight_segments(
    channels: int, stack: int, backbone: Backbone, whole: int, added: int, gmacs: float
) -> None:
    with torch.device("meta"):
        model = OFF(400, channels, stack=stack, backbone=backbone).eval()
        clip = torch.empty(1, channels, 8 * stack, 224, 224)
    assert (count(model), count(model) - count(model.backbone) - count(model.head)) == (whole, added)
    with FlopCounterMode(display=False) as counter:
        assert model(clip).shape == (1, 400)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.01)


def test_the_keys_of_the_backbone_are_torchvisions_and_the_filters_are_not_stored() -> None:
    with torch.device("meta"):
        keys = OFF(5).state_dict().keys()
        expected = {key for key in resnet50().state_dict() if not key.startswith("fc.")}
    assert {key.removeprefix("backbone.") for key in keys if key.startswith("backbone.")} == expected
    others = {key.split(".")[0] for key in keys} - {"backbone"}
    assert others == {"head", "units", "levels", "level_heads"}
    assert not any("sobel" in key for key in keys)


def test_a_ramp_has_its_slope_as_gradient() -> None:
    unit = OFFUnit(4)
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    slopes = torch.arange(-16.0, 16.0)
    ramps = slopes.view(-1, 1, 1) * x + 3 * slopes.flip(0).view(-1, 1, 1) * y + 5
    got = unit.gradients(ramps.expand(2, -1, -1, -1))[..., 1:-1, 1:-1]
    assert got.shape == (2, 64, 4, 5)
    assert torch.equal(got[:, ::2], slopes.view(1, -1, 1, 1).expand(2, -1, 4, 5))
    assert torch.equal(got[:, 1::2], 3 * slopes.flip(0).view(1, -1, 1, 1).expand(2, -1, 4, 5))


def test_a_unit_compares_neighbours_of_one_clip_and_keeps_the_first_ones_gradients() -> None:
    torch.manual_seed(0)
    unit = OFFUnit(8)
    maps = torch.randn(2 * 3, 8, 5, 4)
    with torch.no_grad():
        got = unit(maps, 3)
        spatial, reduced = unit.gradients(unit.spatial(maps)), F.relu(unit.temporal(maps))
        last = unit(maps.contiguous(memory_format=torch.channels_last), 3)
    assert got.shape == (2 * 2, 192, 5, 4)
    for pair, first in enumerate((0, 1, 3, 4)):
        assert torch.equal(got[pair, :64], spatial[first])
        assert torch.equal(got[pair, 64:], reduced[first + 1] - reduced[first])
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, got, rtol=0, atol=1e-5)


def test_a_still_clip_has_no_temporal_gradient_at_any_level() -> None:
    torch.manual_seed(0)
    model = lively()
    moving = torch.rand(2, 3, 4, 64, 64) * 2 - 1
    still = moving[:, :, :1].expand_as(moving).contiguous()
    seen: list[Tensor] = []
    hooks = [unit.register_forward_hook(lambda _module, _inputs, out: seen.append(out)) for unit in model.units]
    with torch.no_grad():
        model(still)
        model(moving)
    for hook in hooks:
        hook.remove()
    assert [tuple(gradients.shape) for gradients in seen[:3]] == [(6, 192, s, s) for s in (8, 4, 2)]
    for at_rest, in_motion in zip(seen[:3], seen[3:], strict=True):
        assert not at_rest[:, 64:].any()
        assert at_rest[:, :64].abs().amax((1, 2, 3)).min() > 0.01
        assert in_motion[:, 64:].abs().amax((1, 2, 3)).min() > 0.01


def test_logits_are_the_sum_of_the_feature_networks_and_the_last_levels() -> None:
    torch.manual_seed(0)
    model = lively()
    clip = torch.rand(2, 3, 4, 64, 64) * 2 - 1
    tsn = TSN(3, backbone="resnet18").eval()
    tsn.load_state_dict({key: value for key, value in model.state_dict().items() if key in tsn.state_dict()})
    with torch.no_grad():
        logits, pooled, scale_logits = model.features(clip)
        alone = tsn.features(clip)
        last = model.level_heads[-1](pooled[:, 512:])
        assert torch.equal(model(clip), logits)
    assert [tuple(scale.shape) for scale in scale_logits] == [(2, 3)] * 4
    assert pooled.shape == (2, model.feature_channels) == (2, 512 + 1024)
    torch.testing.assert_close(scale_logits[0], alone.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled[:, :512], alone.pooled, rtol=0, atol=1e-4)
    torch.testing.assert_close(scale_logits[3], last, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, alone.logits + last, rtol=0, atol=1e-4)


def test_every_level_stands_on_its_stage_and_on_the_finer_levels() -> None:
    model = lively()
    scale_logits = model.features(torch.randn(1, 3, 2, 64, 64)).scale_logits
    parts = {
        **{f"layer{i}": getattr(model.backbone, f"layer{i}")[0].conv1.weight for i in (1, 2, 3, 4)},
        **{f"unit{i}": model.get_parameter(f"units.{i}.temporal.weight") for i in range(3)},
        **{f"level{i}": model.get_parameter(f"levels.{i}.0.weight") for i in range(3)},
    }
    reached = []
    for logits in scale_logits:
        gradients = torch.autograd.grad(logits.sum(), list(parts.values()), retain_graph=True, allow_unused=True)
        reached.append({name for name, value in zip(parts, gradients, strict=True) if value is not None})
    first = {"layer1", "layer2", "unit0", "level0"}
    assert reached[0] == {"layer1", "layer2", "layer3", "layer4"}
    assert reached[1] == first
    assert reached[2] == first | {"layer3", "unit1", "level1"}
    assert reached[3] == set(parts)


def test_the_order_of_segments_matters_to_the_levels_only() -> None:
    torch.manual_seed(0)
    model = lively()
    clip = torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        before, after = model.features(clip), model.features(clip[:, :, [0, 2, 1, 3]])
    torch.testing.assert_close(after.scale_logits[0], before.scale_logits[0], rtol=0, atol=1e-4)
    for one, other in zip(
        (before.logits, *before.scale_logits[1:]), (after.logits, *after.scale_logits[1:]), strict=True
    ):
        assert (one - other).abs().max() > 1e-2 * one.abs().max()


def test_a_clip_does_not_reach_the_others_of_its_batch() -> None:
    torch.manual_seed(0)
    model = lively()
    clip = torch.randn(3, 3, 3, 32, 32)
    other = clip.clone()
    other[1, :, 1] = torch.randn(3, 32, 32)
    with torch.no_grad():
        one, two = model.features(clip).scale_logits, model.features(other).scale_logits
    for before, after in zip(one, two, strict=True):
        assert ((before - after).abs().amax(1) > 1e-4).tolist() == [False, True, False]


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_gradient_from_the_cross_entropies(autocast: bool) -> None:
    torch.manual_seed(0)
    model = OFF(4, 2, stack=2, backbone="resnet18").train()
    clip = torch.randn(2, 2, 6, 64, 64).to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        features = model.features(clip, torch.Generator().manual_seed(0))
    assert features.pooled.dtype == torch.float32
    losses = [F.cross_entropy(logits.float(), torch.tensor([1, 3])) for logits in features.scale_logits]
    torch.autograd.backward(torch.stack(losses).sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_dropout_follows_the_generator_at_every_scale_and_spares_the_pooled_features() -> None:
    torch.manual_seed(0)
    model = OFF(4, backbone="resnet18").train()
    clip = torch.randn(2, 3, 3, 64, 64)

    def features(seed: int, noise: int) -> list[Tensor]:
        torch.manual_seed(noise)
        with torch.no_grad():
            logits, pooled, scale_logits = model.features(clip, torch.Generator().manual_seed(seed))
        return [pooled, logits, *scale_logits]

    first, same, other = features(3, 0), features(3, 1), features(4, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == [True] + [False] * 5
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(features(3, 0), features(4, 1), strict=True))


def test_partial_bn_spares_the_statistics_of_the_levels() -> None:
    model = OFF(2, backbone="resnet18", partial_bn=True).train()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    with torch.no_grad():
        model(torch.randn(2, 3, 3, 64, 64))
    moved = {name for name, norm in norms.items() if norm.running_mean is not None and norm.running_mean.any()}
    levels = {name for name in norms if name.startswith("levels.")}
    assert len(levels) == 3 * (1 + 1) + 3 * 6  # entry and shortcut of each level, three in each of six blocks
    assert moved == {"backbone.bn1"} | levels


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [(64, 64), (112, 112), (96, 160), (33, 71)])
def test_any_size_and_number_of_segments_from_two_works(backbone: Backbone, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = OFF(7, backbone=backbone).eval()
        for frames in (2, 5, 8):
            assert model(torch.empty(2, 3, frames, *size)).shape == (2, 7)


def test_one_segment_is_a_mistake() -> None:
    with torch.device("meta"):
        model = OFF(2, 2, stack=5, backbone="resnet18")
        with pytest.raises(UserError, match=r"one segment only \(5 frames\).* at least 10 frames\.$"):
            model(torch.empty(1, 2, 5, 32, 32))


def test_the_network_exports_and_compiles_without_data_dependent_code(
    exports_and_compiles: Callable[..., None],
) -> None:
    torch.manual_seed(0)
    model = lively()
    exports_and_compiles(model, atol=1e-4)
