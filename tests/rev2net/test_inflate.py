"""The ImageNet start: on a still video the inflated network is the image network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import googlenet

from dataloaders.errors import UserError
from rev2net.models import I3D
from rev2net.models.inflate import inflate_googlenet, inflate_kernel, load_googlenet

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


def image_network(seed: int, aux_logits: bool = False) -> nn.Module:
    """A googlenet with random weights (Kaiming, so that signals live through it) and random statistics."""
    torch.manual_seed(seed)
    net: nn.Module = googlenet(weights=None, aux_logits=aux_logits, init_weights=False, transform_input=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


def outputs(net: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out.clone()}))
        for name in names
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


def test_on_a_still_video_the_inflated_trunk_equals_googlenet() -> None:
    net = image_network(0)
    model = I3D(5).eval()
    report = inflate_googlenet(model, net.state_dict())
    assert (report.new_head, set(report.ignored)) == (True, {"fc.weight", "fc.bias"})

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


def test_the_stem_of_torchvision_without_the_asymmetric_padding_differs() -> None:
    net = image_network(0)
    model = I3D(5).eval()
    inflate_googlenet(model, net.state_dict())
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        volume = model.Conv3d_1a_7x7(image.unsqueeze(2).expand(-1, -1, 16, -1, -1))
        picture = net.get_submodule("conv1")(image)
    assert (volume[:, :, 4] - picture).abs().max() > 0.1


def test_imagenet_weights_expect_plus_minus_one_once_the_input_is_transformed() -> None:
    net = image_network(0)
    clip = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        plain = net(clip * 2 - 1)
        setattr(net, "transform_input", True)  # noqa: B010
        transformed = net((clip - mean) / std)
    torch.testing.assert_close(transformed, plain, rtol=1e-4, atol=1e-4)


def test_kernels_are_repeated_along_time_and_keep_their_sum() -> None:
    kernel = torch.randn(4, 3, 7, 7)
    inflated = inflate_kernel(kernel, 7)
    assert inflated.shape == (4, 3, 7, 7, 7)
    torch.testing.assert_close(inflated.sum(2), kernel)
    assert torch.equal(inflated[:, :, 0], inflated[:, :, 6])


def test_a_file_as_torchvision_publishes_it_loads(tmp_path: Path) -> None:
    net = image_network(1, aux_logits=True)
    torch.save(net.state_dict(), tmp_path / "googlenet-1378be20.pth")
    model = I3D(5)
    head = model.logits.conv3d.weight.detach().clone()
    report = load_googlenet(model, tmp_path / "googlenet-1378be20.pth")
    assert report.loaded == 57 * 5
    assert {key.split(".")[0] for key in report.ignored} == {"fc", "aux1", "aux2"}
    assert torch.equal(model.logits.conv3d.weight, head)
    ours, theirs = model.state_dict(), net.state_dict()
    assert torch.equal(ours["Mixed_5c.b2b.bn.running_var"], theirs["inception5b.branch3.1.bn.running_var"])


def test_p12_networks_and_files_that_do_not_fit_get_one_sentence(tmp_path: Path) -> None:
    state = image_network(1).state_dict()
    with pytest.raises(UserError, match="this one takes 2"):
        inflate_googlenet(I3D(5, in_channels=2), state)
    with pytest.raises(UserError, match=r"Conv3d_1a_7x7\.conv3d\.weight.*shape \(64, 3, 7, 7, 7\)"):
        inflate_googlenet(I3D(5, width=0.25), state)
    with pytest.raises(UserError, match=r"not torchvision's googlenet: it lacks 'conv1\.conv\.weight'"):
        inflate_googlenet(I3D(5), I3D(5, width=0.125).state_dict())
    with pytest.raises(UserError, match="does not exist"):
        load_googlenet(I3D(5), tmp_path / "googlenet.pth")
