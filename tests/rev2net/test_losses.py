"""The objective: each term against another way of computing it, and what enters the total."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rev2net.losses import DDP, TERMS, KLReduction, Objective, Reduction, ddp_low, kl_divergence, norm
from rev2net.models.actionflownet import SCALE_WEIGHTS, multiscale_epe
from rev2net.models.heads import Heads, Latent

N, CLIP = 3, (8, 6, 4)
LABEL = torch.tensor([0, 2, 4])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).requires_grad_()


def latent(seed: int) -> Latent:
    return Latent(mu=leaf(N, 5, 1, 2, 2, seed=seed), logvar=leaf(N, 5, 1, 2, 2, seed=seed + 1))


def features(seed: int) -> tuple[Tensor, ...]:
    return tuple(leaf(N, 4, t, 2 * t, 3, seed=seed + t) for t in (1, 2, 4))


def full_output() -> Heads:
    """Every head as a leaf of the graph, so that its gradient tells which terms reached it."""
    return Heads(
        logits=leaf(N, 5, seed=1),
        pooled=leaf(N, 6, seed=4),
        flow=leaf(N, 2, *CLIP, seed=2),
        frames=leaf(N, 3, *CLIP, seed=3),
        flow_latent=latent(10),
        frame_latent=latent(20),
        flow_features=features(30),
        frame_features=features(40),
    )


def targets() -> tuple[Tensor, Tensor]:
    return torch.rand(N, 3, *CLIP, generator=generator(50)) * 2 - 1, torch.randn(N, 2, *CLIP, generator=generator(51))


def measure(output: Heads, objective: Objective) -> dict[str, Tensor]:
    clip, flow = targets()
    return objective(output, LABEL, clip, flow)


def leaves(output: Heads) -> dict[str, list[Tensor]]:
    assert output.flow is not None and output.frames is not None
    assert output.flow_latent is not None and output.frame_latent is not None
    return {
        "loss/ce": [output.logits],
        "loss/flow": [output.flow],
        "loss/frame": [output.frames],
        "loss/ddp_high": [t for g in (output.flow_latent, output.frame_latent) for t in (g.mu, g.logvar)],
        "loss/ddp_low": [*output.flow_features, *output.frame_features],
    }


def frobenius(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.mean()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_divergence_is_that_of_torch_distributions(reduction: KLReduction) -> None:
    first, second = latent(1), latent(5)
    normal = [torch.distributions.Normal(g.mu, torch.exp(0.5 * g.logvar)) for g in (first, second)]
    elements = torch.distributions.kl_divergence(normal[0], normal[1]).flatten(1)
    expected = {"sum": elements.sum(1), "mean": elements.mean(1)}[reduction].mean()
    torch.testing.assert_close(kl_divergence(first, second, reduction), expected)
    assert kl_divergence(first, first, reduction).item() == 0.0
    assert kl_divergence(second, first).item() != pytest.approx(kl_divergence(first, second).item(), rel=0.01)


def test_the_divergence_is_finite_at_the_ends_of_the_clamp() -> None:
    ends = [
        Latent(mu=torch.full((1, 2, 1, 1, 1), m), logvar=torch.full((1, 2, 1, 1, 1), s)) for m, s in ((5, 8), (-5, -8))
    ]
    for a, b in (ends, ends[::-1]):
        assert kl_divergence(a, b).isfinite()
        assert kl_divergence(a, b) > 0


def test_frobenius_is_one_sample_s_norm_and_rms_divides_by_the_root_of_its_elements() -> None:
    x = torch.randn(4, 3, 5, 2, generator=generator()) * torch.tensor([1.0, 10, 0.1, 3]).reshape(4, 1, 1, 1)
    torch.testing.assert_close(norm(x, "frobenius"), frobenius(x))
    torch.testing.assert_close(norm(x, "rms"), frobenius(x) / 30**0.5)
    torch.testing.assert_close(norm(x[0], "frobenius"), torch.linalg.vector_norm(x[0].flatten(1), dim=1).mean())


@pytest.mark.parametrize("reduction", ["frobenius", "rms"])
def test_the_gradient_of_a_norm_is_zero_at_zero_and_right_elsewhere(reduction: Reduction) -> None:
    x = torch.zeros(2, 3, 4)
    x[1] = torch.randn(3, 4, generator=generator())
    x.requires_grad_()
    norm(x, reduction).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.zeros(3, 4))
    unit = x[1].detach() / x[1].detach().norm()
    torch.testing.assert_close(x.grad[1], unit / 2 / (12**0.5 if reduction == "rms" else 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("reduction", ["frobenius", "rms"])
def test_a_norm_does_not_depend_on_the_memory_layout(layout: torch.memory_format, reduction: Reduction) -> None:
    values = torch.randn(2, 3, 4, 5, 6, generator=generator())
    values[0, :, 1] = 0
    x = values.clone(memory_format=layout).requires_grad_()
    value = norm(x, reduction)
    scale = 360**0.5 if reduction == "rms" else 1
    torch.testing.assert_close(value, frobenius(values) / scale)
    value.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    lengths = torch.linalg.vector_norm(values.flatten(1), dim=1).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(x.grad, values / lengths / 2 / scale)
    zero = torch.zeros(2, 3, 4, 5, 6).to(memory_format=layout).requires_grad_()
    norm(zero, reduction).backward()  # type: ignore[no-untyped-call]
    assert zero.grad is not None and torch.equal(zero.grad, torch.zeros_like(values))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_the_norm_of_a_large_volume_keeps_its_digits(layout: torch.memory_format) -> None:
    x = torch.rand(1, 3, 32, 224, 224, generator=generator())
    exact = frobenius(x.double()).item()
    assert norm(x.to(memory_format=layout), "frobenius").item() == pytest.approx(exact, rel=1e-6)


def test_a_norm_of_half_precision_values_is_taken_in_float32() -> None:
    x = torch.full((1, 70_000), 10.0, dtype=torch.float16)  # the sum of squares is beyond float16
    assert norm(x, "frobenius").item() == pytest.approx(7e6**0.5, rel=1e-4)
    assert norm(x, "rms").item() == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("reduction", ["frobenius", "rms"])
def test_the_low_level_penalty_sums_over_the_layers(reduction: Reduction) -> None:
    output = full_output()
    differences = [f - r for f, r in zip(output.flow_features, output.frame_features, strict=True)]
    scale = [d[0].numel() ** 0.5 if reduction == "rms" else 1 for d in differences]
    expected = sum(frobenius(d) / s for d, s in zip(differences, scale, strict=True))
    torch.testing.assert_close(ddp_low(output, reduction), expected)


def test_the_total_is_equation_3_with_the_paper_s_weights() -> None:
    output = full_output()
    clip, flow = targets()
    terms = measure(output, Objective(reduction="frobenius", ddp_low_reduction="frobenius"))
    assert output.flow is not None and output.frames is not None
    torch.testing.assert_close(terms["loss/ce"], F.cross_entropy(output.logits, LABEL))
    torch.testing.assert_close(terms["loss/flow"], frobenius(output.flow - flow))
    reversed_clip = torch.stack([clip[:, :, t] for t in reversed(range(8))], 2)
    torch.testing.assert_close(terms["loss/frame"], frobenius(output.frames - reversed_clip))
    assert output.flow_latent is not None and output.frame_latent is not None
    torch.testing.assert_close(terms["loss/ddp_high"], kl_divergence(output.flow_latent, output.frame_latent))
    torch.testing.assert_close(terms["loss/ddp_low"], ddp_low(output, "frobenius"))
    expected = (
        terms["loss/ce"]
        + 0.01 * terms["loss/ddp_high"]
        + 0.1 * terms["loss/ddp_low"]
        + 0.1 * terms["loss/flow"]
        + 0.1 * terms["loss/frame"]
    )
    torch.testing.assert_close(terms["loss/total"], expected)


def test_each_term_has_its_own_weight_and_reduction() -> None:
    output = full_output()
    plain = Objective(alpha=0, beta=0, lambda_flow=0, lambda_im=0)
    base = measure(output, plain)
    weights = {"alpha": "ddp_high", "beta": "ddp_low", "lambda_flow": "flow", "lambda_im": "frame"}
    for field, name in weights.items():
        terms = measure(output, replace(plain, **{field: 0.7}))  # type: ignore[arg-type]
        torch.testing.assert_close(terms["loss/total"], base["loss/ce"] + 0.7 * base[f"loss/{name}"])
    reductions = {
        "reduction": ("rms", {"loss/flow", "loss/frame"}),
        "ddp_low_reduction": ("frobenius", {"loss/ddp_low"}),
        "ddp_high_reduction": ("mean", {"loss/ddp_high"}),
    }
    for field, (value, changed) in reductions.items():
        terms = measure(output, replace(plain, **{field: value}))  # type: ignore[arg-type]
        assert {k for k in TERMS if not torch.isclose(terms[k], base[k])} == changed


def test_the_perfect_frame_decoder_gives_the_clip_in_reversed_order() -> None:
    output = full_output()
    clip, _ = targets()
    perfect = torch.stack(clip.unbind(2)[::-1], 2)
    assert measure(replace(output, frames=perfect), Objective())["loss/frame"].item() == 0.0
    assert measure(replace(output, frames=clip), Objective())["loss/frame"].item() > 0.1


DDP_TERMS: dict[DDP, set[str]] = {
    "none": set(),
    "low": {"loss/ddp_low"},
    "high": {"loss/ddp_high"},
    "both": {"loss/ddp_low", "loss/ddp_high"},
}


@pytest.mark.parametrize("ddp", DDP_TERMS)
def test_ddp_decides_what_enters_the_total_and_nothing_else(ddp: DDP) -> None:
    output = full_output()
    terms = measure(output, Objective(ddp=ddp))
    reference = measure(output, Objective())
    assert set(terms) == set(TERMS)
    for name in TERMS[:-1]:  # the unweighted quantities are logged whatever is on
        torch.testing.assert_close(terms[name], reference[name], rtol=0, atol=0)
    on = {"loss/ce", "loss/flow", "loss/frame"} | DDP_TERMS[ddp]
    weights = {"loss/ce": 1.0, "loss/ddp_high": 0.01, "loss/ddp_low": 0.1, "loss/flow": 0.1, "loss/frame": 0.1}
    expected = sum(weights[name] * terms[name] for name in on)
    torch.testing.assert_close(terms["loss/total"], expected)
    terms["loss/total"].backward()  # type: ignore[no-untyped-call]
    for name, tensors in leaves(output).items():
        assert terms[name].requires_grad == (name in on)
        for tensor in tensors:
            assert (tensor.grad is not None) == (name in on), name
            assert tensor.grad is None or tensor.grad.abs().max() > 0


def graph_size(root: Tensor) -> int:
    seen, queue = set(), [root.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [following for following, _ in node.next_functions]
    return len(seen)


def test_a_term_of_weight_zero_is_measured_but_not_in_the_graph() -> None:
    output = full_output()
    off = measure(output, Objective(alpha=0, beta=0, lambda_flow=0, lambda_im=0))
    alone = F.cross_entropy(output.logits.float(), LABEL)
    assert torch.equal(off["loss/total"], alone)
    assert graph_size(off["loss/total"]) == graph_size(alone) < graph_size(measure(output, Objective())["loss/total"])
    assert all(off[name] > 0 and not off[name].requires_grad for name in TERMS[1:-1])


def test_a_network_without_a_head_has_no_such_term() -> None:
    flow_only = replace(full_output(), frames=None, frame_latent=None, frame_features=())
    assert set(measure(flow_only, Objective(ddp="none"))) == {"loss/ce", "loss/flow", "loss/total"}
    nothing = Heads(logits=flow_only.logits, pooled=flow_only.pooled)
    terms = Objective(ddp="none")(nothing, LABEL, targets()[0], None)
    assert set(terms) == {"loss/ce", "loss/total"}
    assert torch.equal(terms["loss/total"], terms["loss/ce"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_losses_are_float32_under_autocast(dtype: torch.dtype) -> None:
    output = full_output()
    with torch.no_grad():
        rounded = replace(
            output,
            logits=output.logits.to(dtype),
            flow_features=tuple(f.to(dtype) for f in output.flow_features),
            frame_features=tuple(f.to(dtype) for f in output.frame_features),
        )
        expected = measure(
            replace(
                rounded,
                logits=rounded.logits.float(),
                flow_features=tuple(f.float() for f in rounded.flow_features),
                frame_features=tuple(f.float() for f in rounded.frame_features),
            ),
            Objective(),
        )
        with torch.autocast("cpu", dtype=dtype):
            terms = measure(rounded, Objective())
    for name in TERMS:
        assert terms[name].dtype == torch.float32
        assert torch.equal(terms[name], expected[name])


def test_nothing_is_recorded_where_gradients_are_off() -> None:
    with torch.no_grad():
        terms = measure(full_output(), Objective())
    assert not any(value.requires_grad for value in terms.values())


def test_every_scale_of_off_has_a_cross_entropy_of_its_own() -> None:
    scales = (leaf(N, 5, seed=60), leaf(N, 5, seed=61), leaf(N, 5, seed=62))
    output = Heads(logits=leaf(N, 5, seed=1), pooled=leaf(N, 6, seed=4), scale_logits=scales)
    scalars = Objective()(output, LABEL, *targets())
    each = [F.cross_entropy(logits, LABEL) for logits in scales]
    torch.testing.assert_close(scalars["loss/scales"], each[0] + each[1] + each[2])
    torch.testing.assert_close(scalars["loss/ce"], F.cross_entropy(output.logits, LABEL))
    assert scalars["loss/total"] == scalars["loss/scales"] and scalars.keys() == {
        "loss/ce",
        "loss/scales",
        "loss/total",
    }


def test_actionflownet_s_flow_loss_is_that_of_its_scales() -> None:
    flows = tuple(leaf(N, 2, 4, 3 * 2**i, 2 * 2**i, seed=70 + i) for i in range(len(SCALE_WEIGHTS)))
    output = Heads(logits=leaf(N, 5, seed=1), pooled=leaf(N, 6, seed=4), flows=flows)
    clip, flow = targets()
    scalars = Objective(lambda_flow=0.3)(output, LABEL, clip, flow)
    torch.testing.assert_close(scalars["loss/flow"], multiscale_epe(flows, flow))
    torch.testing.assert_close(scalars["loss/total"], scalars["loss/ce"] + 0.3 * scalars["loss/flow"])
