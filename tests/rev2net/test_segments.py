"""TSN, TSM and STM: published counts, segments and consensus, the shift, motion, torchvision's keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50
from torchvision.transforms.functional import normalize

from dataloaders.errors import UserError
from rev2net.models.stm import STM, MotionModule, STMBottleneck, TemporalConv
from rev2net.models.tsm import TSM, ShiftBasicBlock, ShiftBottleneck, temporal_shift
from rev2net.models.tsn import BLOCKS_PER_STAGE, TSN, Backbone

NETWORKS = (TSN, TSM, STM)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def lively(model: TSN) -> TSN:
    """In evaluation mode, with statistics and a classifier that let differences be seen."""
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


@cache
def _lively(name: str) -> TSN:
    return lively({"TSN": TSN, "TSM": TSM, "STM": STM}[name](3))


def shared(network: type[TSN]) -> TSN:
    """For tests that change nothing: 3 classes, RGB, resnet50."""
    return _lively(network.__name__)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer blocks: every kind of block is there, with a convolution in its shortcut and without."""
    for backbone in ("resnet18", "resnet50"):
        monkeypatch.setitem(BLOCKS_PER_STAGE, backbone, [2, 1, 1, 1])


def segment_logits(model: TSN, clip: Tensor) -> Tensor:
    """N C T H W -> N S classes, before the consensus."""
    segments = clip.shape[2] // model.stack
    with torch.no_grad():
        logits: Tensor = model.head(model.pool(model.images(clip), segments))
    return logits.view(-1, segments, logits.shape[1])


@pytest.mark.parametrize(
    ("network", "classes", "backbone", "trunk", "whole"),
    [
        (TSN, 400, "resnet50", 23_508_032, 24_327_632),
        (TSN, 400, "resnet18", 11_176_512, 11_381_712),
        (TSM, 400, "resnet50", 23_508_032, 24_327_632),
        (STM, 400, "resnet50", 23_679_140, 24_498_740),
        # The published counts, with the classes of Something-Something v1: 23.9 M for TSM, 24.0 M for STM.
        (TSM, 174, "resnet50", 23_508_032, 23_864_558),
        (STM, 174, "resnet50", 23_679_140, 24_035_666),
    ],
)
def test_published_parameter_counts(
    network: type[TSN], classes: int, backbone: Backbone, trunk: int, whole: int
) -> None:
    with torch.device("meta"):
        model = network(classes, backbone=backbone)
    assert (count(model.backbone), count(model)) == (trunk, whole)


@pytest.mark.parametrize(
    ("network", "channels", "stack", "gmacs"),
    [(TSN, 3, 1, 32.70), (TSM, 3, 1, 32.70), (STM, 3, 1, 33.08), (TSN, 2, 5, 34.91)],
)
def test_multiplications_of_eight_segments(network: type[TSN], channels: int, stack: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = network(400, channels, stack=stack).eval()
        clip = torch.empty(1, channels, 8 * stack, 224, 224)
    with FlopCounterMode(display=False) as counter:
        logits = model(clip)
    assert logits.shape == (1, 400)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.01)


def test_images_of_rgb_are_the_frames_in_imagenets_normalisation() -> None:
    model = TSN(2, backbone="resnet18")
    clip = torch.rand(2, 3, 4, 6, 5)
    images = model.images(clip * 2 - 1)
    assert images.shape == (8, 3, 6, 5)
    expected = normalize(clip[1, :, 2], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(images[4 + 2], expected, rtol=0, atol=1e-5)


def test_images_of_flow_stack_consecutive_frames_u_and_v_in_turn() -> None:
    model = TSN(2, 2, stack=5, backbone="resnet18")
    assert model.backbone.conv1.weight.shape == (64, 10, 7, 7)
    clip = torch.randn(2, 2, 15, 6, 5)
    images = model.images(clip)
    assert images.shape == (6, 10, 6, 5)
    for frame in range(5):
        assert torch.equal(images[3 + 1, 2 * frame], clip[1, 0, 5 + frame])
        assert torch.equal(images[3 + 1, 2 * frame + 1], clip[1, 1, 5 + frame])
    with pytest.raises(UserError, match=r"has 12 frames.* takes 5 of them.* multiple of 5"):
        model.images(clip[:, :, :12])


@pytest.mark.parametrize(("channels", "stack"), [(3, 1), (2, 1), (2, 2)])
def test_the_memory_format_of_the_clip_is_that_of_the_images(channels: int, stack: int) -> None:
    model = TSN(2, channels, stack=stack, backbone="resnet18")
    clip = torch.randn(2, channels, 4, 6, 5)
    assert model.images(clip).is_contiguous()
    last = clip.to(memory_format=torch.channels_last_3d)
    images = model.images(last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, model.images(clip))
    if (channels, stack) == (2, 1):
        assert images.data_ptr() == last.data_ptr()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("clips", [1, 2])
def test_channels_last_goes_through_every_block(network: type[TSN], clips: int) -> None:
    model = shared(network)
    seen: list[Tensor] = []
    blocks = [block for stage in (model.backbone.layer1, model.backbone.layer2) for block in stage]
    hooks = [block.register_forward_hook(lambda _module, _inputs, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        model(torch.randn(clips, 3, 3, 32, 32).to(memory_format=torch.channels_last_3d))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3 + 4
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


@pytest.mark.parametrize(
    ("network", "backbone"),
    [(TSN, "resnet18"), (TSN, "resnet50"), (TSM, "resnet18"), (TSM, "resnet50"), (STM, "resnet50")],
)
def test_the_backbone_has_torchvisions_keys_and_its_weights_load(network: type[TSN], backbone: Backbone) -> None:
    image_network = (resnet18 if backbone == "resnet18" else resnet50)(weights=None)
    weights = {k: v for k, v in image_network.state_dict().items() if not k.startswith("fc.")}
    model = network(2, backbone=backbone)
    loaded = model.backbone.load_state_dict(weights, strict=False)
    assert not loaded.unexpected_keys
    added = {".".join(key.split(".")[2:4]).removesuffix(".weight") for key in loaded.missing_keys}
    assert added == (
        {"temporal", "motion.reduce", "motion.norm", "motion.transform", "motion.expand"} if network is STM else set()
    )
    assert {k for k in model.state_dict() if not k.startswith("backbone.")} == {"head.weight", "head.bias"}


def test_the_features_are_those_of_torchvisions_network() -> None:
    torch.manual_seed(0)
    image_network = resnet18(weights=None).eval()
    model = TSN(3, backbone="resnet18").eval()
    weights = {f"backbone.{k}": v for k, v in image_network.state_dict().items() if not k.startswith("fc.")}
    model.load_state_dict({**model.state_dict(), **weights})
    image_network.fc = nn.Identity()
    clip = torch.rand(2, 3, 4, 64, 64)
    with torch.no_grad():
        pooled = model.features(clip * 2 - 1).pooled
        images = torch.stack(
            [normalize(f, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for f in clip.transpose(1, 2).flatten(0, 1)]
        )
        expected = image_network(images).view(2, 4, 512).mean(1)
    assert model.feature_channels == 512
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [1, 4, 7])
def test_the_consensus_is_the_mean_of_any_number_of_segments(segments: int) -> None:
    model = lively(TSN(3, backbone="resnet18"))
    clip = torch.randn(2, 3, segments, 32, 32)
    with torch.no_grad():
        features = model.features(clip)
        frames = torch.stack([model(clip[:, :, t : t + 1]) for t in range(segments)])
        from_pooled = model.head(features.pooled)
    assert segments == 1 or not torch.equal(frames[0], frames[1])
    torch.testing.assert_close(features.logits, frames.mean(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(features.logits, from_pooled, rtol=0, atol=1e-4)
    assert features.pooled.shape == (2, 512)


@pytest.mark.parametrize(("network", "sees_order"), [(TSN, False), (TSM, True), (STM, True)])
def test_only_tsn_is_blind_to_the_order_of_segments(network: type[TSN], sees_order: bool) -> None:
    model = shared(network)
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        forwards, backwards = model(clip), model(clip.flip(2))
    difference = ((forwards - backwards).abs().max() / forwards.abs().max()).item()
    assert difference > 1e-2 if sees_order else difference < 1e-5


@pytest.mark.parametrize("network", NETWORKS)
def test_a_frame_reaches_the_other_segments_of_its_clip_and_no_other_clip(network: type[TSN]) -> None:
    model = shared(network)
    clip = torch.randn(3, 3, 4, 32, 32)
    other = clip.clone()
    other[1, :, 2] = torch.randn(3, 32, 32)
    moved = (segment_logits(model, clip) - segment_logits(model, other)).abs().amax(2) > 1e-6
    assert moved[1].tolist() == ([False, False, True, False] if network is TSN else [True] * 4)
    assert not moved[0].any() and not moved[2].any()


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_follows_the_generator_and_spares_the_pooled_features(network: type[TSN]) -> None:
    torch.manual_seed(0)
    model = network(4).train()
    nn.init.normal_(model.head.weight, std=0.1)
    clip = torch.randn(2, 3, 4, 32, 32)

    def features(seed: int, noise: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(noise)
        logits, pooled = model.features(clip, torch.Generator().manual_seed(seed))
        return logits.detach(), pooled.detach()

    assert torch.equal(features(3, 0)[0], features(3, 1)[0])
    assert not torch.equal(features(3, 0)[0], features(4, 0)[0])
    assert torch.equal(features(3, 0)[1], features(4, 0)[1])
    model.eval()
    assert torch.equal(features(3, 0)[0], features(4, 1)[0])


def test_dropout_is_drawn_for_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TSN(1, backbone="resnet18", dropout=0.5).train()
    monkeypatch.setattr(model, "pool", lambda images, segments: torch.ones(len(images), 512))
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.features(torch.zeros(2, 3, 4, 32, 32), torch.Generator().manual_seed(0))
    assert torch.unique(seen[0]).tolist() == [0.0, 2.0]
    assert len(torch.unique(seen[0], dim=0)) == 2 * 4


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("partial_bn", [False, True])
def test_partial_bn_keeps_all_statistics_but_the_first_and_trains_scale_and_shift(
    network: type[TSN], partial_bn: bool
) -> None:
    model = network(2, partial_bn=partial_bn).train()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    torch.autograd.backward(model(torch.randn(2, 3, 3, 32, 32)).square().sum())
    moved = {name for name, norm in norms.items() if norm.running_mean is not None and norm.running_mean.any()}
    new = {name for name in norms if ".motion." in name}
    assert len(new) == (5 if network is STM else 0)
    assert moved == ({"backbone.bn1"} | new if partial_bn else set(norms))
    assert all(norm.weight.grad is not None and norm.bias.grad is not None for norm in norms.values())
    assert not any(norm.training for norm in model.eval().modules())


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_gradient(network: type[TSN], autocast: bool) -> None:
    torch.manual_seed(0)
    model = network(4, 2, stack=2).train()
    clip = torch.randn(2, 2, 6, 64, 64).to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, pooled = model.features(clip, torch.Generator().manual_seed(0))
    assert pooled.dtype == torch.float32
    torch.autograd.backward(F.cross_entropy(logits.float(), torch.tensor([1, 3])))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_the_shift_takes_an_eighth_from_the_next_and_an_eighth_from_the_previous_segment() -> None:
    # Two clips of three segments; the value tells clip, segment and channel.
    values = torch.tensor(
        [[[100.0 * n + 10 * t + c / 100 for c in range(16)] for t in range(1, 4)] for n in range(1, 3)]
    )
    images = values.view(6, 16, 1, 1).expand(6, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    shifted = temporal_shift(images, 3)
    assert shifted.is_contiguous(memory_format=torch.channels_last)
    got = shifted[:, :, 1, 0].view(2, 3, 16)
    for clip in range(2):
        assert torch.equal(got[clip, :, :2], torch.stack([values[clip, 1, :2], values[clip, 2, :2], torch.zeros(2)]))
        assert torch.equal(got[clip, :, 2:4], torch.stack([torch.zeros(2), values[clip, 0, 2:4], values[clip, 1, 2:4]]))
        assert torch.equal(got[clip, :, 4:], values[clip, :, 4:])


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_without_its_shift_a_tsm_is_a_tsn_bit_for_bit(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tsn = lively(TSN(3, backbone=backbone))
    tsm = TSM(3, backbone=backbone).eval()
    tsm.load_state_dict(tsn.state_dict())
    clip = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        expected = tsn(clip)
        assert not torch.equal(tsm(clip), expected)
        monkeypatch.setattr("rev2net.models.tsm.temporal_shift", lambda images, segments: images)
        assert torch.equal(tsm(clip), expected)


@pytest.mark.parametrize(
    ("backbone", "kind", "blocks"), [("resnet18", ShiftBasicBlock, 8), ("resnet50", ShiftBottleneck, 16)]
)
def test_every_residual_branch_is_shifted_and_no_shortcut(
    backbone: Backbone, kind: type[nn.Module], blocks: int
) -> None:
    model = TSM(3, backbone=backbone).eval()
    shifted = [m for m in model.backbone.modules() if isinstance(m, kind)]
    assert len(shifted) == blocks
    block = model.backbone.layer1[1]
    x = torch.randn(4, block.conv1.in_channels, 8, 8).relu()
    inputs: list[Tensor] = []
    block.conv1.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    nn.init.zeros_((block.bn3 if backbone == "resnet50" else block.bn2).weight)
    assert torch.equal(block(x, 4), x)
    assert torch.equal(inputs[0], temporal_shift(x, 4))
    assert not torch.equal(inputs[0], x)


def test_the_convolution_along_time_is_channel_wise_and_knows_its_clip() -> None:
    torch.manual_seed(0)
    conv = TemporalConv(8)
    nn.init.normal_(conv.weight)
    images = torch.randn(2 * 5, 8, 3, 4)
    series = images.view(2, 5, 8, 12).permute(0, 3, 2, 1).reshape(24, 8, 5)
    expected = F.conv1d(series, conv.weight.flatten(2), padding=1, groups=8)
    expected = expected.view(2, 12, 8, 5).permute(0, 3, 2, 1).reshape(10, 8, 3, 4)
    torch.testing.assert_close(conv(images, 5), expected, rtol=0, atol=1e-5)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(last, 5), expected, rtol=0, atol=1e-5)


def test_stm_starts_by_looking_to_both_sides() -> None:
    model = STM(2)
    blocks = [m for m in model.modules() if isinstance(m, STMBottleneck)]
    assert len(blocks) == 16
    for block in blocks:
        quarters = block.temporal.weight.detach().view(4, -1, 3)
        for quarter, kernel in zip(quarters, ((1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 1)), strict=True):
            assert torch.equal(quarter, torch.tensor(kernel, dtype=torch.float32).expand_as(quarter))
    images = torch.randn(4, 64, 2, 2)
    out = blocks[0].temporal(images, 4)
    assert torch.equal(out[1:, :16], images[:-1, :16]) and not out[0, :16].any()
    assert torch.equal(out[:-1, 48:], images[1:, 48:]) and not out[-1, 48:].any()
    assert torch.equal(out[:, 16:48], images[:, 16:48])


def still_and_moving() -> tuple[Tensor, Tensor]:
    """Two clips of three segments each, in one and the same image or in different ones: 6 x 64 x 6 x 6."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 6, 6)
    return images[:, :1].expand_as(images).flatten(0, 1), images.flatten(0, 1)


def test_motion_of_a_still_clip_is_zero_where_nothing_is_transformed() -> None:
    module = MotionModule(64, 1).eval()
    still, moving = still_and_moving()
    with torch.no_grad():
        assert module.differences(still, 3).abs().max() > 0.01
        nn.init.zeros_(module.transform.weight)
        module.transform.weight[:, :, 1, 1] = 1.0
        assert not module.differences(still, 3).any()
        assert not module(still, 3).any()
        assert module.differences(moving, 3).view(2, 3, -1)[:, :2].abs().amax(2).min() > 0.1


def test_motion_is_the_transformed_next_segment_minus_this_one_and_zero_for_the_last() -> None:
    module = MotionModule(64, 1).eval()
    nn.init.normal_(module.norm.bias)
    _, images = still_and_moving()
    with torch.no_grad():
        got = module.differences(images, 3)
        reduced = module.norm(module.reduce(images))
        for clip in (0, 3):
            for t in (clip, clip + 1):
                expected = module.transform(reduced[t + 1 : t + 2])[0] - reduced[t]
                torch.testing.assert_close(got[t], expected, rtol=0, atol=1e-5)
            assert not got[clip + 2].any()
        assert not module(images, 3)[2].any()


def test_stm_without_its_temporal_parts_is_a_tsn() -> None:
    tsn = shared(TSN)
    stm = STM(3).eval()
    stm.load_state_dict({**stm.state_dict(), **tsn.state_dict()})
    clip = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        expected = tsn(clip)
        assert (stm(clip) - expected).abs().max() > 0.1 * expected.abs().max()
        for block in stm.modules():
            if isinstance(block, STMBottleneck):
                nn.init.zeros_(block.motion.expand.weight)
                nn.init.zeros_(block.temporal.weight)
                block.temporal.weight[:, :, 1] = 1.0
        assert torch.equal(stm(clip), expected)


@pytest.mark.parametrize("size", [(112, 112), (96, 160), (33, 71)])
def test_stm_takes_odd_sizes(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert STM(7).eval()(torch.empty(2, 3, 8, *size)).shape == (2, 7)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"STM was given the backbone 'resnet18'.* only resnet50"):
        STM(2, backbone="resnet18")
    with pytest.raises(UserError, match=r"TSM was given the backbone 'vgg16'.* resnet18 or resnet50; choose one"):
        TSM(2, backbone="vgg16")  # type: ignore[arg-type]


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("network", "backbone"), [(TSM, "resnet18"), (STM, "resnet50")])
def test_the_network_exports_and_compiles_without_data_dependent_code(
    network: type[TSN], backbone: Backbone, exports_and_compiles: Callable[..., None]
) -> None:
    model = lively(network(4, backbone=backbone))
    exports_and_compiles(model, atol=1e-5)
