"""Starting weights: an inflated network is its image network on a still video, a backbone is torchvision's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import googlenet, resnet18, resnet34, resnet50, resnext50_32x4d
from torchvision.models.video import r3d_18
from torchvision.transforms.v2.functional import normalize

from dataloaders.errors import UserError
from rev2net.models.actionflownet import R3D18
from rev2net.models.i3d import I3D
from rev2net.models.imagenet import cross_modality, inflate_kernel, load_imagenet, load_weights
from rev2net.models.off import OFF
from rev2net.models.stm import STM
from rev2net.models.tsm import TSM
from rev2net.models.tsn import TSN

State = dict[str, Tensor]

ENDPOINTS = {
    "Conv3d_1a_7x7": "conv1",
    "Conv3d_2c_3x3": "conv3",
    "Mixed_3b": "inception3a",
    "Mixed_3c": "inception3b",
    "Mixed_4b": "inception4a",
    "Mixed_4e": "inception4d",
    "Mixed_4f": "inception4e",
    "Mixed_5b": "inception5a",
    "Mixed_5c": "inception5b",
}


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights (Kaiming, so that signals live through it) and random statistics."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


class Images:
    """torchvision's image networks with random weights, as they are published: built and saved when asked for."""

    build: Mapping[str, Callable[[], nn.Module]] = {
        "googlenet": lambda: googlenet(weights=None, aux_logits=True, init_weights=False, transform_input=False),
        "resnet18": lambda: resnet18(weights=None),
        "resnet50": lambda: resnet50(weights=None),
    }

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nets: dict[str, nn.Module] = {}

    def net(self, name: str) -> nn.Module:
        if name not in self._nets:
            self._nets[name] = randomise(self.build[name]())
        return self._nets[name]

    def file(self, name: str) -> Path:
        path = self.folder / f"{name}.pth"
        if not path.exists():
            torch.save(self.net(name).state_dict(), path)
        return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    made = Images(tmp_path_factory.mktemp("torchvision"))
    yield made
    for path in made.folder.iterdir():
        path.unlink()


def copied(net: nn.Module) -> State:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(load: Callable[[nn.Module, Path], object], network: nn.Module, path: Path | str) -> str:
    """The sentence that a network gets for a file, after which it is as it was."""
    before = copied(network)
    with pytest.raises(UserError) as error:
        load(network, path)  # type: ignore[arg-type]
    assert same(before, network.state_dict())
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(state: Mapping[str, object], path: Path) -> Path:
    torch.save(dict(state), path)
    return path


def without_fc(net: nn.Module) -> nn.Module:
    net.fc = nn.Identity()
    return net.eval()


def outputs(net: nn.Module, names: list[str], x: Tensor) -> State:
    found: State = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out.clone()}))
        for name in names
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


def test_on_a_still_video_i3d_equals_googlenet(images: Images) -> None:
    net = googlenet(weights=None, aux_logits=True, init_weights=False, transform_input=False).eval()
    net.load_state_dict(images.net("googlenet").state_dict())
    model = I3D(5).eval()
    load_imagenet(model, images.file("googlenet"))

    image = torch.rand(1, 3, 32, 64) * 2 - 1
    # 128 frames: zero padding is felt for about 50 frames from a border at Mixed_5c.
    volumes = outputs(model, list(ENDPOINTS), image.unsqueeze(2).expand(-1, -1, 128, -1, -1))
    stem = net.get_submodule("conv1.conv")
    assert isinstance(stem, nn.Conv2d)
    stem.padding = (0, 0)
    pictures = outputs(net, list(ENDPOINTS.values()), F.pad(image, (2, 3, 2, 3)))

    for ours, theirs in ENDPOINTS.items():
        volume, picture = volumes[ours], pictures[theirs]
        assert volume.shape[3:] == picture.shape[2:], ours
        middle = volume[:, :, volume.shape[2] // 2]
        assert picture.std() > 0.05, f"{theirs} says nothing"
        torch.testing.assert_close(middle, picture, rtol=1e-4, atol=1e-4 * picture.abs().max().item(), msg=ours)


def test_googlenets_stem_without_the_asymmetric_padding_differs(images: Images) -> None:
    model = I3D(5).eval()
    load_imagenet(model, images.file("googlenet"))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        volume = model.Conv3d_1a_7x7(image.unsqueeze(2).expand(-1, -1, 16, -1, -1))
        picture = images.net("googlenet").get_submodule("conv1")(image)
    assert (volume[:, :, 4] - picture).abs().max() > 0.1


def test_googlenets_weights_expect_plus_minus_one_once_the_input_is_transformed() -> None:
    net = randomise(googlenet(weights=None, aux_logits=False, init_weights=False, transform_input=False))
    clip = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        plain = net(clip * 2 - 1)
        setattr(net, "transform_input", True)  # noqa: B010
        transformed = net(normalize(clip, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(transformed, plain, rtol=1e-4, atol=1e-4)


def test_googlenet_as_it_is_published_leaves_its_classifiers_behind(images: Images) -> None:
    model = I3D(5)
    head = model.logits.conv3d.weight.detach().clone()
    report = load_imagenet(model, images.file("googlenet"))
    assert (report.loaded, report.new_head, report.file_classes) == (57 * 5, True, 1000)
    assert {key.split(".")[0] for key in report.ignored} == {"fc", "aux1", "aux2"}
    assert torch.equal(model.logits.conv3d.weight, head)
    ours, theirs = model.state_dict(), images.net("googlenet").state_dict()
    assert torch.equal(ours["Mixed_5c.b2b.bn.running_var"], theirs["inception5b.branch3.1.bn.running_var"])


def test_on_a_still_video_r3d_equals_a_resnet_without_its_maximum_pool(images: Images) -> None:
    net = resnet18(weights=None)
    net.load_state_dict(images.net("resnet18").state_dict())
    net.maxpool = nn.Identity()
    model = R3D18(5).eval()
    report = load_imagenet(model, images.file("resnet18"))
    assert (report.loaded, set(report.ignored)) == (20 * 5, {"fc.weight", "fc.bias"})

    image = torch.randn(1, 3, 32, 48)
    layers = ["layer1", "layer2", "layer3", "layer4"]
    pictures = outputs(net.eval(), layers, image)
    # 112 frames: zero padding is felt for 54 frames from a border at layer4.
    volumes = outputs(model.trunk, layers, image.unsqueeze(2).expand(-1, -1, 112, -1, -1))
    for layer in layers:
        middle = volumes[layer][:, :, volumes[layer].shape[2] // 2]
        assert pictures[layer].std() > 0.05, f"{layer} says nothing"
        torch.testing.assert_close(
            middle, pictures[layer], rtol=1e-4, atol=1e-4 * pictures[layer].abs().max().item(), msg=layer
        )


def test_kernels_are_repeated_along_time_and_keep_their_sum() -> None:
    kernel = torch.randn(4, 3, 7, 7)
    inflated = inflate_kernel(kernel, 7)
    assert inflated.shape == (4, 3, 7, 7, 7)
    torch.testing.assert_close(inflated.sum(2), kernel)
    assert torch.equal(inflated[:, :, 0], inflated[:, :, 6])


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_tsn_sees_what_torchvisions_network_sees(images: Images, backbone: str) -> None:
    model = TSN(5, backbone=backbone, dropout=0.0).eval()  # type: ignore[arg-type]
    head = copied(model.head)
    report = load_imagenet(model, images.file(backbone))
    assert (report.file_classes, report.layout) == (1000, f"torchvision {backbone}")
    pixels = torch.rand(3, 2, 3, 64, 64)
    clip = (pixels * 2 - 1).transpose(1, 2)
    net = without_fc(Images.build[backbone]())
    net.load_state_dict(images.net(backbone).state_dict(), strict=False)
    normalised = normalize(pixels.flatten(0, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(model.images(clip), normalised, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        pooled = net(model.images(clip))
        assert torch.equal(model.backbone(model.images(clip)), pooled)
        assert torch.equal(model.features(clip).pooled, pooled.view(3, 2, -1).mean(1))
    assert same(head, model.head.state_dict())


@pytest.mark.parametrize("build", [TSM, STM, OFF])
def test_what_the_image_network_lacks_stays_fresh(images: Images, build: type[TSN]) -> None:
    model = build(5)
    before, theirs = copied(model), images.net("resnet50").state_dict()
    report = load_imagenet(model, images.file("resnet50"))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"backbone.{key}" for key in theirs if not key.startswith("fc.") and "num_batches" not in key}
    assert report.loaded == len(changed) == 53 * 5
    assert all(torch.equal(model.state_dict()[key], theirs[key.removeprefix("backbone.")]) for key in changed)


def test_cross_modality_kernels_are_the_channel_mean(images: Images) -> None:
    kernel = torch.randn(4, 3, 7, 7)
    assert cross_modality(kernel, 3) is kernel
    spread = cross_modality(kernel, 10)
    assert spread.shape == (4, 10, 7, 7)
    for channel in range(10):
        torch.testing.assert_close(spread[:, channel], (kernel[:, 0] + kernel[:, 1] + kernel[:, 2]) / 3)

    flow = TSN(5, 2, stack=5, backbone="resnet18")
    load_imagenet(flow, images.file("resnet18"))
    rgb = images.net("resnet18").state_dict()
    assert torch.equal(flow.backbone.conv1.weight, cross_modality(rgb["conv1.weight"], 10))
    assert torch.equal(flow.backbone.layer1[0].conv1.weight, rgb["layer1.0.conv1.weight"])

    for network, first, image, frames in (
        (I3D(5, 2), "Conv3d_1a_7x7.conv3d.weight", images.net("googlenet").state_dict()["conv1.conv.weight"], 7),
        (R3D18(5, 2), "trunk.stem.0.weight", rgb["conv1.weight"], 3),
    ):
        load_imagenet(network, images.file("googlenet" if frames == 7 else "resnet18"))
        ours = network.state_dict()[first]
        assert ours.shape[1:3] == (2, frames)
        assert torch.equal(ours[:, 0], ours[:, 1])
        torch.testing.assert_close(ours.sum((1, 2)), image.sum(1) * 2 / 3)


def test_auto_takes_torchvisions_file_from_the_cache_and_never_downloads(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for network, name, file in (
        (I3D(5), "googlenet", "googlenet-1378be20.pth"),
        (R3D18(5), "resnet18", "resnet18-f37072fd.pth"),
        (TSN(5, backbone="resnet18"), "resnet18", "resnet18-f37072fd.pth"),
        (TSM(5), "resnet50", "resnet50-0676ba61.pth"),
    ):
        message = refusal(load_imagenet, network, "auto")
        assert f"torchvision's {name}, but there is no file {cache / file}" in message
        assert f"download https://download.pytorch.org/models/{file} and put it there" in message
        (cache / file).symlink_to(images.file(name))
        assert load_imagenet(network, "auto").source == str(cache / file)
        (cache / file).unlink()


def test_auto_prefers_the_first_published_weights_and_takes_the_second(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    model = TSN(5)
    for file in ("resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth"):
        (cache / file).symlink_to(images.file("resnet50"))
        assert load_imagenet(model, "auto").source == str(cache / file)


def test_p12_images_that_do_not_fit_get_one_sentence_and_change_nothing(images: Images, tmp_path: Path) -> None:
    def meta(build: Callable[[], nn.Module]) -> State:
        """Every tensor of the network's shapes, from one number each."""
        with torch.device("meta"):
            shapes = build().state_dict()
        return {key: torch.zeros(()).expand(value.shape) for key, value in shapes.items()}

    i3d, r3d, tsn, small = I3D(5), R3D18(5), TSN(5), TSN(5, backbone="resnet18")
    files = {
        "resnet34": saved(meta(resnet34), tmp_path / "34.pth"),
        "resnext": saved(meta(resnext50_32x4d), tmp_path / "x.pth"),
        "r3d_18": saved(meta(r3d_18), tmp_path / "r3d.pth"),
        "i3d": saved(meta(lambda: I3D(5)), tmp_path / "i3d.pth"),
        "tsn": saved(meta(lambda: TSN(5)), tmp_path / "tsn.pth"),
        "other": saved({"weight": torch.zeros(3)}, tmp_path / "other.pth"),
        **{name: images.file(name) for name in Images.build},
    }
    url = "https://download.pytorch.org/models/"
    for network, file, holds, wants in (
        (tsn, "resnet18", "torchvision's resnet18, but TSN", "resnet50"),
        (small, "resnet50", "torchvision's resnet50, but TSN", "resnet18"),
        (tsn, "resnet34", "torchvision's resnet34, but TSN", "resnet50"),
        (tsn, "resnext", "an unknown network, but TSN", "resnet50"),
        (tsn, "googlenet", "torchvision's googlenet, but TSN", "resnet50"),
        (i3d, "resnet50", "torchvision's resnet50, but I3D", "googlenet"),
        (r3d, "r3d_18", "torchvision's r3d_18, a video network, but R3D18", "resnet18"),
        (i3d, "i3d", "a video network, but I3D", "googlenet"),
        (tsn, "tsn", "a video network, but TSN", "resnet50"),
        (r3d, "other", "an unknown network, but R3D18", "resnet18"),
    ):
        message = refusal(load_imagenet, network, files[file])
        assert f"{files[file]} holds {holds} starts from torchvision's {wants}: give {wants}-" in message
        assert f".pth ({url}{wants}-" in message
        assert ("for init_from" in message) == ("video network" in holds)

    whole = images.net("resnet18").state_dict()
    holed = saved({k: v for k, v in whole.items() if k != "layer4.1.bn2.running_var"}, tmp_path / "holed.pth")
    assert "is not a whole resnet18: it lacks 'layer4.1.bn2.running_var'" in refusal(load_imagenet, small, holed)
    assert "model.width=1" in refusal(load_imagenet, I3D(5, width=0.25), files["googlenet"])
    assert "there is no file nowhere.pth: download" in refusal(load_imagenet, tsn, "nowhere.pth")
    assert "is a folder" in refusal(load_imagenet, tsn, tmp_path)


ENCODERS: dict[str, Callable[[int], nn.Module]] = {
    "r3d": lambda classes: R3D18(classes, width=0.125),
    "tsn": lambda classes: TSN(classes, backbone="resnet18"),
    "off": lambda classes: OFF(classes, backbone="resnet18"),
    "i3d": lambda classes: I3D(classes, width=0.125),
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_of_a_whole_network_the_encoder_loads_and_heads_for_other_classes_stay_fresh(
    tmp_path: Path, encoder: str
) -> None:
    build = ENCODERS[encoder]
    source = randomise(build(4), seed=1)
    whole = {f"encoder.{k}": v for k, v in source.state_dict().items()} | {"decoder.flow.weight": torch.zeros(2)}
    save_file(whole, tmp_path / "weights.safetensors")
    target = build(4)
    report = load_weights(target, tmp_path / "weights.safetensors")
    assert same(source.state_dict(), target.state_dict())
    assert (report.new_head, report.ignored) == (False, ("decoder.flow.weight",))

    target = build(7)
    before = copied(target)
    report = load_weights(target, tmp_path / "weights.safetensors")
    assert (report.new_head, report.file_classes) == (True, 4)
    # What has another shape is a classifier's, and nothing else stays.
    heads = {key for key, value in source.state_dict().items() if value.shape != before[key].shape}
    assert len(heads) == (8 if encoder == "off" else 2)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key] if key in heads else source.state_dict()[key]), key


def test_torchvisions_kinetics_weights_load_into_r3d(tmp_path: Path) -> None:
    net = randomise(r3d_18(weights=None))
    path = saved(net.state_dict(), tmp_path / "r3d_18-b3b3357e.pth")
    model = R3D18(400, dropout=0.0).eval()
    report = load_weights(model, path)
    path.unlink()
    assert (report.loaded, report.new_head, report.layout) == (len(net.state_dict()), False, "torchvision r3d_18")
    pixels = torch.rand(1, 4, 3, 32, 32)
    normalised = normalize(pixels, [0.43216, 0.394666, 0.37645], [0.22803, 0.22145, 0.216989]).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model((pixels * 2 - 1).transpose(1, 2)), net(normalised), rtol=1e-3, atol=1e-4)


def published(state: Mapping[str, Tensor], classes: int, *, shifted: bool) -> State:
    """As mit-han-lab/temporal-shift-module saves a network, from torchvision's keys."""
    keys: State = {}
    for key, value in state.items():
        part = key.split(".")
        if key.startswith("fc."):
            continue
        if shifted and part[0].startswith("layer") and part[2] == "conv1":
            part.insert(3, "net")
        keys[f"module.base_model.{'.'.join(part)}"] = value
    width = state["fc.weight"].shape[1]
    return keys | {"module.new_fc.weight": torch.ones(classes, width), "module.new_fc.bias": torch.ones(classes)}


def test_published_kinetics_weights_of_tsm_load(images: Images, tmp_path: Path) -> None:
    theirs = images.net("resnet18").state_dict()
    state = published(theirs, 6, shifted=True)
    assert "module.base_model.layer3.1.conv1.net.weight" in state
    path = saved({"epoch": 50, "arch": "resnet18", "state_dict": state}, tmp_path / "tsm.pth")
    model = TSM(6, backbone="resnet18")
    report = load_weights(model, path)
    assert (report.layout, report.new_head, report.ignored) == ("temporal-shift-module", False, ())
    assert torch.equal(model.head.weight, torch.ones(6, 512))
    assert same(model.backbone.state_dict(), {k: v for k, v in theirs.items() if not k.startswith("fc.")})
    assert load_weights(TSM(5, backbone="resnet18"), path).new_head

    unshifted = saved(published(theirs, 6, shifted=False), tmp_path / "tsn.pth")
    assert load_weights(TSN(6, backbone="resnet18"), unshifted).layout == "temporal-shift-module"
    assert "conv1.net.weight' is unknown to TSN" in refusal(load_weights, TSN(6, backbone="resnet18"), path)


def test_p12_weights_that_do_not_fit_get_one_sentence_and_change_nothing(images: Images, tmp_path: Path) -> None:
    rgb, flow = TSN(5, backbone="resnet18"), TSN(5, 2, stack=5, backbone="resnet18")
    path = saved(rgb.state_dict(), tmp_path / "tsn.pth")
    message = refusal(load_weights, rgb, images.file("resnet18"))
    assert "holds an image network (torchvision's resnet18) where TSN weights are wanted" in message
    assert "model.imagenet" in message
    assert "3 (RGB) input channels, but the network takes 10" in refusal(load_weights, flow, path)
    assert "'backbone.conv1.weight' is unknown to I3D" in refusal(load_weights, I3D(5, width=0.125), path)
    assert "does not fit the network" in refusal(load_weights, TSN(5), path)
    assert "trunk.stem.0.weight' has the shape" in refusal(
        load_weights, R3D18(5), saved(R3D18(5, width=0.125).state_dict(), tmp_path / "narrow.pth")
    )
    assert "does not exist" in refusal(load_weights, rgb, tmp_path / "none.pth")
