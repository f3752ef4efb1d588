"""ImageNet start: torchvision's googlenet (Inception-v1 for images) inflated into I3D.

Carreira and Zisserman (2017), section 2.4.1: every k x k kernel is repeated along time and divided by the time
extent, so that on a still video the three-dimensional network computes what the image network does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dataloaders.errors import UserError
from rev2net.models.i3d import I3D
from rev2net.models.weights import LoadReport, fit, read_tensors

GOOGLENET_LAYOUT = "torchvision googlenet"

_STEM = {"conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3"}
_BLOCKS = {
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
_BRANCHES = {
    "branch1": "b0",
    "branch2.0": "b1a",
    "branch2.1": "b1b",
    "branch3.0": "b2a",
    "branch3.1": "b2b",
    "branch4.1": "b3b",
}
_UNITS = _STEM | {
    f"{block}.{branch}": f"{ours}.{unit}" for block, ours in _BLOCKS.items() for branch, unit in _BRANCHES.items()
}
_TENSORS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def inflate_kernel(kernel: Tensor, frames: int) -> Tensor:
    """Out x in x h x w -> out x in x frames x h x w: repeated along time, divided by `frames`."""
    return kernel.unsqueeze(2).expand(-1, -1, frames, -1, -1) / frames


def inflate_googlenet(
    model: I3D, state_dict: Mapping[str, Tensor], *, source: str = "the googlenet state_dict"
) -> LoadReport:
    """Copy googlenet's trunk, inflated, into `model`; the classifier keeps its fresh values.

    Feed the network [-1, 1] as always. torchvision builds googlenet with `transform_input=True` beside its
    ImageNet weights, which maps ImageNet-normalised pixels to [-1, 1] before the first convolution: the weights
    themselves expect [-1, 1], and nothing has to be folded into the stem.

    On a still video, away from the temporal borders (zero padding is felt for about 50 frames at `Mixed_5c`), and
    with sides that are multiples of 32, every endpoint equals googlenet's, its stem padded (2, 3) and not (3, 3).

    Args:
        model: an RGB I3D of width 1.
        state_dict: of `torchvision.models.googlenet`, with or without the auxiliary classifiers.
        source: names the state_dict in errors and in the report.

    Raises:
        UserError: the network is not RGB, or the state_dict is not googlenet's, or the shapes differ.
    """
    channels = model.Conv3d_1a_7x7.conv3d.in_channels
    if channels != 3:
        raise UserError(
            f"The ImageNet start needs a network with 3 input channels (RGB), but this one takes {channels};"
            " leave the ImageNet start out, or train on RGB."
        )
    own = model.state_dict()
    inflated: dict[str, Tensor] = {}
    used: set[str] = set()
    for unit, ours in _UNITS.items():
        for name in _TENSORS:
            key = f"{unit}.{name}"
            if key not in state_dict:
                raise UserError(
                    f"{source} is not torchvision's googlenet: it lacks {key!r}; give its state_dict,"
                    " for example googlenet-1378be20.pth."
                )
            target = f"{ours}.{name.replace('conv.', 'conv3d.')}"
            value = state_dict[key]
            inflated[target] = inflate_kernel(value, own[target].shape[2]) if value.ndim == 4 else value
            used.add(key)
    ignored = tuple(k for k in state_dict if k not in used and not k.endswith("num_batches_tracked"))
    return fit(model, inflated, source=source, layout=GOOGLENET_LAYOUT, ignored=ignored)


def load_googlenet(model: I3D, path: str | Path) -> LoadReport:
    """`inflate_googlenet` from a file, such as torchvision's googlenet-1378be20.pth.

    Raises:
        UserError: as `inflate_googlenet` and `rev2net.models.weights.read_tensors`.
    """
    return inflate_googlenet(model, read_tensors(path), source=str(path))
