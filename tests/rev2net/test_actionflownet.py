"""ActionFlowNet: published counts, torchvision's weights, the flow pyramid, its loss, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import R3D_18_Weights, r3d_18

from rev2net.models.actionflownet import (
    FLOW_STRIDES,
    KINETICS_MEAN,
    KINETICS_STD,
    R3D18,
    SCALE_WEIGHTS,
    ActionFlowNet,
    multiscale_epe,
)
from rev2net.models.heads import Heads

Size3 = tuple[int, int, int]

CLIP: Size3 = (8, 32, 32)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(clip: Size3 = CLIP, dropout: float = 0.0) -> ActionFlowNet:
    """A narrow network whose flow layers no longer predict zero, so that every part of it can be seen in the flow."""
    torch.manual_seed(0)
    network = ActionFlowNet(R3D18(4, width=0.125, dropout=dropout), clip)
    for conv in network.decoder.flow:
        assert isinstance(conv, nn.Conv3d)
        nn.init.normal_(conv.weight, std=0.05)
    return network


def objective(output: Heads, target: Tensor) -> Tensor:
    labels = torch.arange(len(output.logits)) % 4
    return F.cross_entropy(output.logits.float(), labels) + multiscale_epe(output.flows, target)


def test_parameters_and_macs_are_those_published() -> None:
    clip = (16, 112, 112)
    with torch.device("meta"):
        network = ActionFlowNet(R3D18(400), clip)
        x = torch.empty(1, 3, *clip)
    meta = R3D_18_Weights.KINETICS400_V1.meta
    assert parameters(network.encoder) == meta["num_params"] == 33_371_472
    assert parameters(network.encoder.trunk) == 33_166_272
    assert parameters(network) == 39_210_208
    macs = []
    for run in (network, network.heads):
        with FlopCounterMode(display=False) as counter:
            run(x)
        macs.append(counter.get_total_flops() / 2e9)
    assert macs == [pytest.approx(meta["_ops"], abs=5e-3), pytest.approx(45.697, abs=5e-3)]
    assert meta["_ops"] == pytest.approx(40.7, abs=0.05)


def test_torchvisions_keys_load_behind_a_prefix_and_give_its_logits() -> None:
    torch.manual_seed(0)
    published = r3d_18(weights=None).eval()
    for module in published.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model = R3D18(400).eval()
    state = {f"trunk.{k}".replace("trunk.fc.", "head."): v for k, v in published.state_dict().items()}
    model.load_state_dict(state, strict=True)
    clip = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (KINETICS_MEAN, KINETICS_STD))
    with torch.no_grad():
        expected, got = published(((clip + 1) / 2 - mean) / std), model(clip)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_flow_input_reaches_the_stem_as_it_is() -> None:
    torch.manual_seed(0)
    model = R3D18(4, in_channels=2, width=0.125).eval()
    clip = torch.rand(1, 2, 4, 16, 16) * 2 - 1
    seen: list[Tensor] = []
    model.trunk.stem.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    assert model(clip).shape == (1, 4)
    assert torch.equal(seen[0], clip)


@pytest.mark.parametrize(
    ("clip", "sizes"),
    [
        ((16, 112, 112), [(2, 7, 7), (4, 14, 14), (8, 28, 28), (16, 56, 56)]),
        ((8, 64, 64), [(1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32)]),
        ((5, 49, 50), [(1, 4, 4), (2, 7, 7), (3, 13, 13), (5, 25, 25)]),
    ],
)
def test_flows_have_the_sizes_of_the_encoders_volumes(clip: Size3, sizes: list[Size3]) -> None:
    with torch.device("meta"):
        network = ActionFlowNet(R3D18(11, width=0.25), clip).eval()
        x = torch.empty(2, 3, *clip)
        features, output = network.encoder.features(x), network.heads(x)
    assert [flow.shape for flow in output.flows] == [(2, 2, *size) for size in sizes]
    assert [v.shape[2:] for v in features.volumes] == sizes[::-1]
    assert [v.shape[1] for v in features.volumes] == [16, 32, 64, 128]
    for size, stride in zip(sizes, FLOW_STRIDES, strict=True):
        assert size == tuple(math.ceil(c / s) for c, s in zip(clip, stride, strict=True))
    assert output.flow is not None and output.flow.shape == (2, 2, *clip)
    assert output.pooled.shape == features.pooled.shape == (2, network.encoder.feature_channels)
    assert output.logits.shape == (2, 11)


def test_a_fresh_network_predicts_no_motion() -> None:
    torch.manual_seed(0)
    network = ActionFlowNet(R3D18(4, width=0.125), CLIP).train()
    output = network.heads(torch.rand(2, 3, *CLIP) * 2 - 1)
    assert len(output.flows) == 4
    assert all(flow.eq(0).all() for flow in output.flows)


def test_each_flow_stands_on_its_own_volume_and_on_all_coarser_ones() -> None:
    decoder = small().decoder.eval()
    sizes = [(64, 1, 2, 2), (32, 2, 4, 4), (16, 4, 8, 8), (8, 8, 16, 16)]
    volumes = [torch.randn(1, *size) for size in sizes]
    with torch.no_grad():
        flows = decoder(tuple(volumes[::-1]))
        for changed in range(4):
            others = [v + 1 if i == changed else v for i, v in enumerate(volumes)]
            differ = [not torch.equal(a, b) for a, b in zip(flows, decoder(tuple(others[::-1])), strict=True)]
            assert differ == [scale >= changed for scale in range(4)]


def test_a_coarse_flow_is_handed_to_the_finer_scale() -> None:
    network = small().eval()
    clip = torch.rand(1, 3, *CLIP) * 2 - 1
    coarsest = network.decoder.flow[0]
    assert isinstance(coarsest, nn.Conv3d) and coarsest.bias is not None
    with torch.no_grad():
        before = network.heads(clip).flows
        coarsest.bias.add_(1.0)
        after = network.heads(clip).flows
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(after, before, strict=True))


def test_the_full_flow_is_the_finest_one_in_the_same_units() -> None:
    network = small().eval()
    with torch.no_grad():
        output = network.heads(torch.rand(1, 3, *CLIP) * 2 - 1)
    assert output.flow is not None
    torch.testing.assert_close(output.flow.mean((3, 4)), output.flows[-1].mean((3, 4)), rtol=0.05, atol=0.01)


def test_a_constant_flow_predicted_at_every_scale_costs_nothing() -> None:
    constant = torch.tensor([0.5, -0.25]).view(1, 2, 1, 1, 1)
    sizes = [(1, 4, 4), (2, 7, 7), (3, 13, 13), (5, 25, 25)]
    flows = [constant.expand(2, 2, *size) for size in sizes]
    assert multiscale_epe(flows, constant.expand(2, 2, 5, 49, 50)) == 0
    for scale in range(4):
        wrong = [flow + 1 if i == scale else flow for i, flow in enumerate(flows)]
        loss = multiscale_epe(wrong, constant.expand(2, 2, 5, 49, 50)).item()
        assert loss == pytest.approx(SCALE_WEIGHTS[scale] * math.sqrt(2))


def test_the_end_point_error_is_the_distance_to_the_mean_flow_of_each_cell() -> None:
    target = torch.zeros(1, 2, 2, 2, 2)
    target[:, 0, 0] = torch.tensor([[6.0, 2.0], [0.0, 0.0]])  # mean over all 8 cells: 1
    coarse, fine = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 2, 2, 2)
    coarse[:, 0], coarse[:, 1] = 4.0, 4.0  # (3, 4) away
    fine[:, 1, 1] = 2.0  # 4 cells 2 away, others 6, 2, 0, 0
    assert multiscale_epe([coarse], target, [1.0]).item() == pytest.approx(5.0)
    assert multiscale_epe([fine], target, [1.0]).item() == pytest.approx((4 * 2 + 6 + 2) / 8)
    assert multiscale_epe([coarse, fine], target, [0.1, 10.0]).item() == pytest.approx(0.5 + 20.0)
    with pytest.raises(ValueError):
        multiscale_epe([coarse, fine], target, [1.0])


def test_the_scales_weigh_as_in_flownet() -> None:
    per_sum = (0.08, 0.02, 0.01, 0.005)
    per_mean = [weight * 4**scale for scale, weight in enumerate(per_sum)]
    assert list(SCALE_WEIGHTS) == pytest.approx([weight / sum(per_mean) for weight in per_mean])


def test_the_error_is_float32_and_its_gradient_finite_at_zero_distance() -> None:
    torch.manual_seed(0)
    target = torch.randn(1, 2, 2, 4, 4).bfloat16()
    coarse = torch.zeros(1, 2, 1, 2, 2, dtype=torch.bfloat16)
    fine = target.clone().requires_grad_()
    loss = multiscale_epe([coarse, fine], target, [0.5, 0.5])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, multiscale_epe([coarse.float(), target.float()], target.float(), [0.5, 0.5]))
    torch.autograd.backward(loss)
    assert fine.grad is not None and fine.grad.eq(0).all()


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = ActionFlowNet(R3D18(4, width=0.125), CLIP).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    clip, target = torch.rand(4, 3, *CLIP) * 2 - 1, torch.randn(4, 2, *CLIP)
    for step in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(objective(network.heads(clip, torch.Generator().manual_seed(step)), target))
        assert not [name for name, p in network.named_parameters() if p.grad is None]
        optimizer.step()
    # Flow layers start at zero, so that it takes a step until something flows back through them, and one more until
    # the finest reads the flow that is handed to it.
    still = [name for name, p in network.named_parameters() if p.grad is None or p.grad.eq(0).all()]
    assert not still


def test_the_flow_loss_reaches_the_whole_trunk() -> None:
    network = small().train()
    torch.autograd.backward(multiscale_epe(network.heads(torch.rand(2, 3, *CLIP)).flows, torch.randn(2, 2, *CLIP)))
    reached = {name for name, p in network.encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, _ in network.encoder.named_parameters()} - reached == {"head.weight", "head.bias"}


def test_the_network_at_test_is_the_encoder_alone() -> None:
    network = small(dropout=0.5).eval()
    clip = torch.rand(2, 3, *CLIP) * 2 - 1
    with torch.no_grad():
        logits = network.heads(clip).logits
        assert torch.equal(network(clip), logits)
        assert torch.equal(network.encoder(clip), logits)
    keys = {name.split(".")[0] for name in network.encoder.state_dict()}
    assert keys == {"trunk", "head"}
    assert parameters(network) == parameters(network.encoder) + parameters(network.decoder)


def test_unlabelled_clips_only_give_pooled_features() -> None:
    network = small().eval()
    clip = torch.rand(3, 3, *CLIP) * 2 - 1
    with torch.no_grad():
        every, some = network.heads(clip), network.heads(clip, labelled=1)
    assert torch.equal(some.pooled, every.pooled)
    assert torch.equal(some.logits, every.logits[:1])
    for a, b in zip(some.flows, every.flows, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_generator_and_leaves_the_pooled_features_alone() -> None:
    network = small(dropout=0.5).train()
    clip = torch.rand(2, 3, *CLIP) * 2 - 1

    def run(seed: int, noise: int) -> Heads:
        torch.manual_seed(noise)
        with torch.no_grad():
            return network.heads(clip, torch.Generator().manual_seed(seed))

    assert torch.equal(run(3, 0).logits, run(3, 1).logits)
    assert not torch.equal(run(3, 0).logits, run(4, 0).logits)
    assert torch.equal(run(3, 0).pooled, run(4, 0).pooled)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_weight_gradients_in_bfloat16_are_right_where_volumes_have_two_frames(layout: torch.memory_format) -> None:
    network = small((16, 32, 32)).train()
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))}
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for name, module in convolutions.items():

        def keep(_module: nn.Module, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach().float()
            out.register_hook(lambda gradient: gradients.update({name: gradient.float()}))

        module.register_forward_hook(keep)
    clip = (torch.rand(2, 3, 16, 32, 32) * 2 - 1).contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(network.heads(clip), torch.randn(2, 2, 16, 32, 32))
    torch.autograd.backward(loss)
    assert sum(x.shape[2] == 2 for x in inputs.values()) >= 4
    for name, module in convolutions.items():
        weight = module.weight.detach().clone().requires_grad_()
        plain: dict[str, object] = {"stride": module.stride, "padding": module.padding}
        if isinstance(module, nn.ConvTranspose3d):
            out = F.conv_transpose3d(inputs[name], weight, output_padding=module.output_padding, **plain)  # type: ignore[arg-type]
        else:
            out = F.conv3d(inputs[name], weight, **plain)  # type: ignore[call-overload]
        torch.autograd.backward(out, gradients[name])
        assert weight.grad is not None and module.weight.grad is not None
        error = (module.weight.grad - weight.grad).norm() / weight.grad.norm()
        assert error < 0.01, f"{name}: {error}"


def test_the_network_at_test_exports_without_data_dependent_code() -> None:
    model = small().encoder.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, *CLIP),), dynamic_shapes=({0: batch},))
    clip = torch.randn(3, 3, *CLIP)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(clip), model(clip), rtol=0, atol=1e-5)


def test_width_scales_every_hidden_volume_and_keeps_the_keys() -> None:
    with torch.device("meta"):
        full, half = ActionFlowNet(R3D18(10), CLIP), ActionFlowNet(R3D18(10, width=0.5), CLIP)
        volumes = half.encoder.features(torch.empty(1, 3, *CLIP)).volumes
    assert full.state_dict().keys() == half.state_dict().keys()
    assert [v.shape[1] for v in volumes] == [32, 64, 128, 256]
    assert 0.2 < parameters(half) / parameters(full) < 0.3
