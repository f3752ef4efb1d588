"""The encoder: published counts, shapes, SAME padding, dropout, activation checkpointing, export."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rev2net.models.i3d import (
    ENDPOINTS,
    I3D,
    Mixed,
    SameConv3d,
    SameMaxPool3d,
    keyed_dropout,
    same_padding,
    scale_channels,
)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same_pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zero padding as TensorFlow's documentation states it, case by case on the remainder of the division."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        along = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        pads = [along // 2, along - along // 2, *pads]
    return F.pad(x, pads)


@pytest.mark.parametrize(("classes", "count"), [(400, 12_697_264), (101, 12_390_789)])
def test_published_parameter_counts(classes: int, count: int) -> None:
    with torch.device("meta"):
        model = I3D(classes)
    assert parameters(model) == count
    assert count - parameters(model.logits) == 12_287_264


@pytest.mark.parametrize(("frames", "gmacs"), [(32, 55.6), (16, 27.8)])
def test_published_multiplications(frames: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = I3D(400).eval()
        clip = torch.empty(1, 3, frames, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(clip)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.05)


def test_the_head_is_the_mean_over_windows_of_two_frames() -> None:
    """Carreira and Zisserman 2017: average pooling 2x7x7, logits, mean over what is left of the time."""
    model = I3D(5, width=0.03125).eval()
    high = torch.randn(2, model.high_channels, 4, 3, 2)
    with torch.no_grad():
        windows = [model.logits(high[:, :, t : t + 2].mean((2, 3, 4), keepdim=True)).flatten(1) for t in range(3)]
        torch.testing.assert_close(model.classify(high), torch.stack(windows).mean(0))
        one = model.logits(high[:, :, :1].mean((3, 4), keepdim=True)).flatten(1)
        torch.testing.assert_close(model.classify(high[:, :, :1]), one)


@pytest.mark.parametrize(
    ("clip", "low", "high"),
    [
        ((32, 224, 224), (192, 16, 56, 56), (1024, 4, 7, 7)),
        ((16, 112, 112), (192, 8, 28, 28), (1024, 2, 4, 4)),
        ((8, 64, 64), (192, 4, 16, 16), (1024, 1, 2, 2)),
        ((16, 96, 160), (192, 8, 24, 40), (1024, 2, 3, 5)),
    ],
)
def test_volumes_that_the_heads_stand_on(clip: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = I3D(11).eval()
        features = model.features(torch.empty(2, 3, *clip))
    assert features.logits.shape == (2, 11)
    assert features.low.shape == (2, *low)
    assert features.high.shape == (2, *high)
    assert (model.low_channels, model.high_channels) == (low[0], high[0])
    for size, stride, volume in zip(clip, model.low_stride, low[1:], strict=True):
        assert math.ceil(size / stride) == volume
    for size, stride, volume in zip(clip, model.high_stride, high[1:], strict=True):
        assert math.ceil(size / stride) == volume


def test_a_real_forward_pass_gives_finite_logits_that_depend_on_the_clip() -> None:
    torch.manual_seed(0)
    model = I3D(5, width=0.125).eval()
    with torch.no_grad():
        logits = model(torch.rand(3, 3, 8, 64, 64) * 2 - 1)
    assert logits.shape == (3, 5)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_even_sizes_pad_the_stem_two_before_and_three_after() -> None:
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(225, 7, 2) == (3, 3)
    assert same_padding(7, 1, 2) == (0, 0)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (1, 1), (3, 2), (2, 2)])
@pytest.mark.parametrize("size", [(8, 14, 14), (7, 13, 9), (5, 8, 11)])
def test_convolution_equals_explicit_same_padding(kernel: int, stride: int, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    conv = SameConv3d(2, 3, kernel, stride, bias=False)
    x = torch.randn(1, 2, *size)
    expected = F.conv3d(same_pad(x, (kernel,) * 3, (stride,) * 3), conv.weight, stride=stride)
    got = conv(x)
    assert got.shape[2:] == tuple(math.ceil(s / stride) for s in size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
@pytest.mark.parametrize("size", [(8, 14, 16), (7, 13, 9), (1, 4, 5), (2, 2, 2), (3, 1, 7)])
def test_ceil_mode_pooling_equals_zero_padded_pooling(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size).relu()
    expected = F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)
    assert torch.equal(SameMaxPool3d(kernel, stride)(x), expected)


def test_every_pool_of_the_network_is_among_those_tested_above() -> None:
    pools = {(m.kernel, m.stride) for m in I3D(2, width=0.125).modules() if isinstance(m, SameMaxPool3d)}
    assert pools == {
        ((1, 3, 3), (1, 2, 2)),
        ((3, 3, 3), (2, 2, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 3, 3), (1, 1, 1)),
    }


def test_keyed_dropout_is_reproducible_and_keeps_the_mean() -> None:
    x = torch.ones(4, 1000, 2, 1, 1)

    def draw(seed: int) -> Tensor:
        return keyed_dropout(x, 0.25, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.unique(draw(1)).tolist() == pytest.approx([0.0, 1 / 0.75])
    assert draw(1).mean().item() == pytest.approx(1.0, abs=0.03)
    assert keyed_dropout(x, 0.0, None) is x


def test_p5_dropout_of_the_network_follows_the_generator_and_not_the_global_state() -> None:
    torch.manual_seed(0)
    model = I3D(4, width=0.125).train()
    clip = torch.randn(2, 3, 8, 32, 32)

    def logits(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        return model.features(clip, torch.Generator().manual_seed(seed)).logits.detach()

    assert torch.equal(logits(3, 0), logits(3, 1))
    assert not torch.equal(logits(3, 0), logits(4, 0))
    model.eval()
    assert torch.equal(logits(3, 0), logits(4, 1))


Numbers = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def two_steps(*, checkpointing: bool) -> Numbers:
    """The losses, the last gradients, and the state after two forward and backward passes."""
    torch.manual_seed(0)
    model = I3D(4, width=0.125, activation_checkpointing=checkpointing).train()
    losses = []
    for step in range(2):
        clip = torch.randn(2, 3, 8, 64, 64)
        model.zero_grad()
        logits = model.features(clip, torch.Generator().manual_seed(step)).logits
        loss: Tensor = F.cross_entropy(logits, torch.tensor([1, 3]))
        torch.autograd.backward(loss)
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return torch.stack(losses), gradients, model.state_dict()


def test_activation_checkpointing_changes_no_number() -> None:
    plain, saving = two_steps(checkpointing=False), two_steps(checkpointing=True)
    assert torch.equal(plain[0], saving[0])
    for expected, got in zip(plain[1:], saving[1:], strict=True):
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name
    assert saving[2]["Mixed_5c.b0.bn.num_batches_tracked"] == 2


def test_a_checkpointed_block_compiles_and_moves_its_statistics_once() -> None:
    torch.manual_seed(0)
    model = I3D(4, width=0.125, activation_checkpointing=True).train()
    block = model.get_submodule("Mixed_3b")
    assert isinstance(block, Mixed)
    before = copy.deepcopy(block)
    x = torch.randn(2, 24, 4, 8, 8).relu()
    run = torch.compile(lambda volume: model._run(block, volume), backend="aot_eager", fullgraph=True)
    for module, output in ((block, run(x)), (before, before(x))):
        torch.autograd.backward(output.square().sum())
        assert module.b1b.bn.num_batches_tracked == 1
    for name, value in before.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), value, msg=name)
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(block.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_activation_checkpointing_goes_with_sync_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group it normalises like any other, but checks what it counts."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    torch.manual_seed(0)
    clip = torch.randn(2, 3, 8, 32, 32)
    moved = []
    for saving in (False, True):
        torch.manual_seed(0)
        plain = I3D(4, width=0.125, dropout=0.0, activation_checkpointing=saving).train()
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(plain)
        model(clip).square().sum().backward()
        moved.append({name: value.clone() for name, value in model.named_buffers()})
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_activation_checkpointing_recomputes_the_inception_blocks_only() -> None:
    model = I3D(4, width=0.125, activation_checkpointing=True).train()
    runs = dict.fromkeys(("Conv3d_2c_3x3", "Mixed_3b", "Mixed_5c"), 0)

    def count(name: str) -> None:
        runs[name] += 1

    for name in runs:
        unit = getattr(model, name)
        first = unit.b0 if name.startswith("Mixed") else unit
        first.conv3d.register_forward_pre_hook(lambda *_, name=name: count(name))
    torch.autograd.backward(model(torch.randn(1, 3, 16, 64, 64)).sum())
    assert runs == {"Conv3d_2c_3x3": 1, "Mixed_3b": 2, "Mixed_5c": 2}


def test_the_network_at_test_exports_without_data_dependent_code() -> None:
    torch.manual_seed(0)
    model = I3D(4, width=0.125).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 8, 64, 64),), dynamic_shapes=({0: batch},))
    clip = torch.randn(3, 3, 8, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(clip), model(clip), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "width", "scaled"), [(64, 1.0, 64), (64, 0.25, 16), (16, 0.125, 8), (20, 1.0, 20)]
)
def test_scaled_channels_are_multiples_of_eight(channels: int, width: float, scaled: int) -> None:
    assert scale_channels(channels, width) == scaled


def test_width_scales_every_hidden_volume_and_keeps_the_keys() -> None:
    with torch.device("meta"):
        full, half = I3D(10), I3D(10, width=0.5)
        volumes = half.features(torch.empty(1, 3, 8, 64, 64))
    assert full.state_dict().keys() == half.state_dict().keys()
    assert volumes.low.shape[1] == half.low_channels == 96
    assert volumes.high.shape[1] == half.high_channels == 512
    assert volumes.logits.shape == (1, 10)
    assert 0.2 < parameters(half) / parameters(full) < 0.3
    assert {name for name, _ in half.named_children()} == {*ENDPOINTS, "logits"}
