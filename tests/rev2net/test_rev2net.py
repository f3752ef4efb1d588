"""The network with its decoders: sizes, cost, switches, composition, randomness, numerical health."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rev2net.distributed import computes_in_bf16
from rev2net.losses import TERMS, Objective
from rev2net.models import I3D, Rev2Net
from rev2net.models.heads import Heads, Latent
from rev2net.models.i3d import Mixed, SameConv3d
from rev2net.models.rev2net import HIDDEN, LATENT, LOGVAR_RANGE, UpConv3d

Size = tuple[int, int, int]
TINY = 0.03125
"""Width at which every encoder layer has its minimum of 8 channels."""


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gmacs(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops() / 2e9)


def tiny(clip: Size = (8, 32, 32), *, flow: bool = True, frame: bool = True, seed: int = 0, **options: Any) -> Rev2Net:
    """A network whose output layers are not zero any more, as after some training."""
    torch.manual_seed(seed)
    network = Rev2Net(I3D(4, width=TINY), clip, flow_decoder=flow, frame_decoder=frame, **options)
    draw = generator(0)
    for name in ("flow_output.flow", "frame_output.up", "frame_output.background"):
        if flow if name.startswith("flow") else frame:
            torch.nn.init.normal_(network.get_submodule(name).weight, std=0.07, generator=draw)
    return network


def random_clip(n: int, size: Size, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("clip", "latent", "stages"),
    [
        ((32, 224, 224), (4, 7, 7), [(8, 14, 14), (16, 28, 28), (16, 56, 56), (16, 112, 112)]),
        ((16, 112, 112), (2, 4, 4), [(4, 7, 7), (8, 14, 14), (8, 28, 28), (8, 56, 56)]),
        ((8, 64, 64), (1, 2, 2), [(2, 4, 4), (4, 8, 8), (4, 16, 16), (4, 32, 32)]),
        ((16, 64, 64), (2, 2, 2), [(4, 4, 4), (8, 8, 8), (8, 16, 16), (8, 32, 32)]),
    ],
)
def test_the_stages_of_both_decoders_follow_from_the_clip(clip: Size, latent: Size, stages: list[Size]) -> None:
    with torch.device("meta"):
        output = Rev2Net(I3D(11), clip).heads(torch.empty(2, 3, *clip))
    hidden = [torch.Size((2, HIDDEN, *size)) for size in stages]
    assert [f.shape for f in output.flow_features] == hidden
    assert [f.shape for f in output.frame_features] == hidden
    for gaussian in (output.flow_latent, output.frame_latent):
        assert gaussian is not None
        assert gaussian.mu.shape == gaussian.logvar.shape == (2, LATENT, *latent)
    assert output.flow is not None and output.flow.shape == (2, 2, *clip)
    assert output.frames is not None and output.frames.shape == (2, 3, *clip)
    assert output.logits.shape == (2, 11)


@pytest.mark.parametrize("clip", [(12, 64, 64), (0, 64, 64), (8, 64, 66), (8, 28, 64)])
def test_a_clip_that_does_not_fit_the_strides_is_refused(clip: Size) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=rf"clip of {clip[0]}x{clip[1]}x{clip[2]}"):
        Rev2Net(I3D(2, width=TINY), clip)


def test_a_stage_grows_an_axis_at_most_twofold() -> None:
    for source, target in (((2, 4, 4), (5, 8, 8)), ((2, 4, 4), (2, 4, 3)), ((2, 4, 4), (2, 6, 8))):
        with torch.device("meta"), pytest.raises(ValueError, match="cannot grow"):
            UpConv3d(2, 2, source, target, bias=False)


@pytest.mark.parametrize("clip", [(32, 224, 224), (16, 112, 112), (16, 64, 64)])
def test_the_whole_network_costs_at_most_1_45_times_its_encoder(clip: Size) -> None:
    with torch.device("meta"):
        network, x = Rev2Net(I3D(400), clip), torch.empty(1, 3, *clip)
        ratio = gmacs(lambda: network.heads(x)) / gmacs(lambda: network.encoder(x))
    assert ratio <= 1.45
    assert ratio == pytest.approx(1.385, abs=0.002)


def test_a_decoder_that_is_off_has_no_parameters_and_no_cost() -> None:
    clip = (32, 224, 224)
    cost: dict[tuple[bool, bool], tuple[float, int]] = {}
    with torch.device("meta"):
        x = torch.empty(1, 3, *clip)
        for flow, frame in ((False, False), (True, False), (False, True), (True, True)):
            network = Rev2Net(I3D(400), clip, flow_decoder=flow, frame_decoder=frame)
            cost[flow, frame] = (gmacs(lambda n=network: n.heads(x)), parameters(network) - parameters(network.encoder))  # type: ignore[misc]
            heads = {k.split("_")[0] for k in network.state_dict() if not k.startswith(("encoder.", "skip."))}
            assert heads == {name for name, on in (("flow", flow), ("frame", frame)) if on}
        i3d = gmacs(lambda: I3D(400)(x))
    assert cost[False, False] == (i3d, 0)
    assert cost[True, False][1] == 623_810
    assert cost[False, True][1] == 626_407
    assert cost[True, True][1] == 623_810 + 626_407
    assert cost[True, False][0] - i3d == pytest.approx(10.521, abs=0.001)
    assert cost[False, True][0] - i3d == pytest.approx(10.879, abs=0.001)
    assert cost[True, True][0] - i3d == pytest.approx(10.521 + 10.879, abs=0.001)


@pytest.mark.parametrize(("flow", "frame"), [(True, False), (False, True), (False, False)])
def test_a_decoder_that_is_off_gives_nothing_to_the_objective(flow: bool, frame: bool) -> None:
    output = tiny(flow=flow, frame=frame).eval().heads(random_clip(1, (8, 32, 32)))
    assert [output.flow is not None, output.flow_latent is not None, bool(output.flow_features)] == [flow] * 3
    assert [output.frames is not None, output.frame_latent is not None, bool(output.frame_features)] == [frame] * 3


def test_a_decoder_computes_the_same_with_and_without_the_other() -> None:
    both, alone = tiny().eval(), tiny(frame=False, seed=1).eval()
    weights = {k: v for k, v in both.state_dict().items() if k in alone.state_dict()}
    weights["skip.weight"] = weights["skip.weight"][:, :HIDDEN]
    alone.load_state_dict(weights)
    clip = random_clip(2, (8, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(alone.heads(clip).flow, both.heads(clip).flow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", ["flow", "frame"])
def test_the_low_level_part_is_one_convolution_over_the_concatenation(decoder: str) -> None:
    network = tiny((16, 64, 64)).eval()
    clip = random_clip(1, (16, 64, 64))
    offset = 0 if decoder == "flow" else HIDDEN
    own = getattr(network, f"{decoder}_low")
    joined = UpConv3d(HIDDEN + network.encoder.low_channels, HIDDEN, (8, 16, 16), (8, 32, 32), bias=False)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([own.weight, network.skip.weight[:, offset : offset + HIDDEN]]))
        features = getattr(network.heads(clip), f"{decoder}_features")
        low = network.encoder.features(clip).low
        expected = getattr(network, f"{decoder}_norm")(joined(torch.cat([features[-2], low], 1)))
    assert expected.std() > 0.01
    torch.testing.assert_close(features[-1], expected, rtol=1e-4, atol=1e-5)


def test_called_with_a_clip_it_is_its_encoder_alone() -> None:
    network = tiny().eval()
    clip = random_clip(2, (8, 32, 32))
    touched: list[str] = []
    for name, module in network.named_modules():
        if name and not name.startswith("encoder"):
            module.register_forward_hook(lambda *_, name=name: touched.append(name))
    with torch.no_grad():
        logits = network(clip)
        assert torch.equal(logits, network.encoder(clip))
        assert not touched
        assert torch.equal(logits, network.heads(clip).logits)
    assert {"skip", "flow_output", "frame_output"} <= set(touched)


def test_the_encoder_s_weights_are_those_of_a_plain_i3d() -> None:
    with torch.device("meta"):
        network, plain = Rev2Net(I3D(400), (32, 224, 224)), I3D(400)
    weights = network.encoder.state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert not any(word in key for key in weights for word in ("flow", "frame", "skip", "latent"))
    assert {k for k in network.state_dict() if k.startswith("encoder.")} == {f"encoder.{k}" for k in weights}


def test_frames_are_a_mask_between_a_moving_foreground_and_a_still_background() -> None:
    network = tiny((8, 64, 64))
    output = network.frame_output
    x = torch.randn(2, HIDDEN, 4, 32, 32, generator=generator(0)) * 20  # far into tanh and sigmoid
    assert output.up.bias is not None
    with torch.no_grad():
        output.up.bias[3] = 0
        frames = output(x)
        assert frames.shape == (2, 3, 8, 64, 64)
        assert frames.abs().max() <= 1
        output.up.bias[3] = -1e4  # mask 0: background alone
        background = output(x)
        assert background.std() > 0.01
        assert torch.equal(background, background[:, :, :1].expand_as(background))
        still = torch.tanh(output.background(x.mean(2, keepdim=True)))[:, :, 0]
        doubled = F.interpolate(still, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(background[:, :, 0], doubled, rtol=0, atol=1e-5)
        output.up.bias[3] = 1e4  # mask 1: foreground alone
        foreground = output(x)
        torch.testing.assert_close(foreground, torch.tanh(output.up(x)[:, :3]))
        assert (foreground[:, :, 1:] - foreground[:, :, :1]).abs().max() > 0.1
        output.up.bias[3] = 0
        mask = torch.sigmoid(output.up(x)[:, 3:])
        assert mask.min() < 0.1 and mask.max() > 0.9
        torch.testing.assert_close(frames, mask * foreground + (1 - mask) * background, rtol=0, atol=1e-5)


def test_evaluation_uses_the_latent_means_and_draws_nothing() -> None:
    network = tiny().eval()
    clip = random_clip(2, (8, 32, 32))
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = network.heads(clip, generator(1)), network.heads(clip)
        assert first.flow_latent is not None and first.flow is not None and second.flow is not None
        assert torch.equal(first.flow, second.flow)
        stages = network.flow_high(first.flow_latent.mu)
    assert torch.equal(stages[-1], first.flow_features[-2])
    assert torch.equal(torch.get_rng_state(), state)


def test_p5_training_s_randomness_comes_from_the_generator_alone() -> None:
    network = tiny((16, 64, 64)).train()
    clip = random_clip(2, (16, 64, 64))

    def outputs(seed: int, globally: int) -> tuple[Tensor, ...]:
        torch.manual_seed(globally)
        out = network.heads(clip, generator(seed))
        assert out.flow is not None and out.frames is not None
        return out.logits, out.flow, out.frames

    with torch.no_grad():
        first, again, other = outputs(1, 10), outputs(1, 11), outputs(2, 10)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_the_two_latents_are_sampled_independently_with_their_own_spread() -> None:
    mu = torch.full((1, LATENT, 4, 7, 7), 3.0)
    noise = generator(0)
    first = Latent(mu=mu, logvar=torch.full_like(mu, 2 * 0.5**0.5)).sample(noise)
    second = Latent(mu=mu, logvar=torch.full_like(mu, -8.0)).sample(noise)
    assert first.mean().item() == pytest.approx(3.0, abs=0.05)
    assert first.std().item() == pytest.approx(2.718281828 ** (0.5**0.5), rel=0.02)
    assert second.std().item() == pytest.approx(2.718281828**-4, rel=0.02)
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.03


@pytest.mark.parametrize(
    ("skip", "skips"), [("none", ()), ("flow", ("flow",)), ("frame", ("frame",)), ("both", ("flow", "frame"))]
)
def test_only_the_decoders_that_skip_read_the_low_level_volume(skip: str, skips: tuple[str, ...]) -> None:
    network, clip = tiny(skip=skip, hidden=6).eval(), random_clip(1, (8, 32, 32))
    before = network.heads(clip)
    assert {f.shape[1] for f in (*before.flow_features, *before.frame_features)} == {6}
    if skips:
        network.skip.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
    after = network.heads(clip)
    for name, one, other in (("flow", before.flow, after.flow), ("frame", before.frames, after.frames)):
        assert one is not None and other is not None
        assert torch.equal(one, other) == (name not in skips)


def test_without_noise_the_decoders_get_the_latent_means() -> None:
    clip = random_clip(2, (8, 32, 32))
    for noise in (False, True):
        network = tiny(noise=noise).train()
        first, second = (network.heads(clip, generator(seed)) for seed in (0, 1))
        assert first.flow_features and torch.equal(first.flow_features[0], second.flow_features[0]) == (not noise)


def test_the_log_variance_stays_in_its_range_and_in_float32() -> None:
    network = tiny()
    high = torch.randn(1, network.encoder.high_channels, 1, 2, 2) * 1e6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = Latent(*network.flow_latents(high))
    assert latent.mu.dtype == latent.logvar.dtype == torch.float32
    assert (latent.logvar.min().item(), latent.logvar.max().item()) == LOGVAR_RANGE


def test_an_untrained_decoder_says_no_motion_and_mid_gray_and_learns_at_the_first_step() -> None:
    torch.manual_seed(0)
    network = Rev2Net(I3D(4, width=TINY), (8, 32, 32)).train()
    output = network.heads(random_clip(2, (8, 32, 32)), generator(0))
    assert output.flow is not None and output.frames is not None
    assert not output.flow.any() and not output.frames.any()
    (output.flow.sum() + output.frames.sum()).backward()  # type: ignore[no-untyped-call]
    for layer in (network.flow_output.flow, network.frame_output.up, network.frame_output.background):
        assert layer.weight.grad is not None and layer.weight.grad[:, :3].abs().max() > 0


def test_both_gaussians_start_near_the_standard_one() -> None:
    output = tiny((16, 64, 64)).train().heads(random_clip(4, (16, 64, 64)), generator(0))
    for latent in (output.flow_latent, output.frame_latent):
        assert latent is not None
        assert latent.mu.abs().mean() < 0.3
        assert latent.logvar.abs().mean() < 0.3


# oneDNN (3.13, bfloat16, CPUs with those instructions) left parts of the weight gradient unwritten where a volume has
# two frames. What was there before is visible only if it is not zero: freed memory is filled with NaN.


def fill_freed_memory_with_nan() -> None:
    blocks = [torch.full((n,), float("nan")) for n in (1_000, 10_000, 100_000, 1_000_000, 3_000_000) for _ in range(4)]
    del blocks


def gradients(module: nn.Module, x: Tensor, bf16: bool) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    fill_freed_memory_with_nan()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y = module(x)
    fill_freed_memory_with_nan()
    y.float().backward(torch.randn(y.shape, generator=generator(5)))
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"input": x.grad, **found}


@pytest.mark.parametrize("space", [(2, 2, 2), (2, 4, 4)])
def test_gradients_of_a_bfloat16_convolution_over_two_frames_are_all_written(space: Size) -> None:
    torch.manual_seed(0)
    conv = SameConv3d(192, 384, 3, bias=False).train()
    x = torch.randn(4, 192, *space).to(memory_format=torch.channels_last_3d)
    expected = gradients(conv, x, bf16=False)
    for _ in range(4):
        for name, gradient in gradients(conv, x, bf16=True).items():
            assert gradient.isfinite().all(), name
            error = (gradient - expected[name]).norm() / expected[name].norm()
            assert error < 0.02, name


def test_gradients_of_a_bfloat16_inception_block_over_two_frames_are_close_to_float32() -> None:
    torch.manual_seed(0)
    block = Mixed(832, (384, 192, 384, 48, 128, 128)).train()  # Mixed_5c at 16x64x64
    x = torch.randn(4, 832, 2, 2, 2).relu().to(memory_format=torch.channels_last_3d)
    expected = gradients(block, x, bf16=False)
    for _ in range(2):
        found = gradients(block, x, bf16=True)
        assert found.keys() == expected.keys() and len(found) == 19
        for name, gradient in found.items():
            assert gradient.isfinite().all(), name
            # The statistics of 32 elements amplify what bfloat16 rounds.
            assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.98, name


def heads_of(output: Heads) -> list[Tensor]:
    assert output.flow is not None and output.frames is not None
    assert output.flow_latent is not None and output.frame_latent is not None
    latents = [t for latent in (output.flow_latent, output.frame_latent) for t in (latent.mu, latent.logvar)]
    return [output.logits, output.flow, output.frames, *latents]


@pytest.mark.parametrize(
    ("bf16", "steps"),
    [(False, 500), (True, 250 if computes_in_bf16(torch.device("cpu")) else 60)],  # emulated it takes six times as long
    ids=["fp32", "bf16"],
)
def test_hundreds_of_steps_meet_no_value_that_is_not_finite(bf16: bool, steps: int) -> None:
    clip = (8, 32, 32)
    network, objective = tiny(clip).train(), Objective()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    draw = generator(0)
    for step in range(steps):
        video, flow = (torch.rand(2, c, *clip, generator=draw) * 2 - 1 for c in (3, 2))
        label = torch.randint(4, (2,), generator=draw)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = network.heads(video, draw)
            scalars = objective(output, label, video, flow)
        optimizer.zero_grad()
        scalars["loss/total"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert set(scalars) == set(TERMS)
        sums = [head.detach().double().square().sum() for head in heads_of(output)]
        norms = torch._foreach_norm([p.detach() for p in network.parameters()])
        values = torch.stack([*(v.detach().double() for v in (*scalars.values(), *norms)), *sums])
        assert values.isfinite().all(), f"step {step}"
