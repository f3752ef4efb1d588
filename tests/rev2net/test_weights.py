"""Published and exported weights: both layouts, safe loading, errors that name what does not fit."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dataloaders.errors import UserError
from rev2net.models import I3D, Rev2Net
from rev2net.models.imagenet import load_weights
from rev2net.models.weights import read_tensors

WIDTH = 0.125

# Keys read off the modules of hassony2/kinetics_i3d_pytorch (src/i3dpt.py), ours beside them.
HASSONY_UNITS = {
    "conv3d_1a_7x7": "Conv3d_1a_7x7",
    "conv3d_2b_1x1": "Conv3d_2b_1x1",
    "conv3d_2c_3x3": "Conv3d_2c_3x3",
    "conv3d_0c_1x1": "logits",
    **{
        f"mixed_{block}.branch_{theirs}": f"Mixed_{block}.{ours}"
        for block in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
        for theirs, ours in zip(
            ("0", "1.0", "1.1", "2.0", "2.1", "3.1"), ("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), strict=True
        )
    },
}


def network(seed: int, classes: int = 7, channels: int = 3, width: float = WIDTH) -> I3D:
    """A network of which every tensor, running statistics and biases too, is random."""
    torch.manual_seed(seed)
    model = I3D(classes, channels, width).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and ".conv3d.weight" not in name:
            value.uniform_(0.5, 1.5)
    return model


def as_hassony(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours_to_theirs = {ours: theirs for theirs, ours in HASSONY_UNITS.items()}
    renamed = {}
    for key, value in state.items():
        unit, layer, name = re.fullmatch(r"(.+)\.(conv3d|bn)\.(\w+)", key).groups()  # type: ignore[union-attr]
        renamed[f"{ours_to_theirs[unit]}.{'batch3d' if layer == 'bn' else layer}.{name}"] = value
    return renamed


def without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def assert_same(a: I3D, b: I3D, *, but: str = "no prefix at all") -> None:
    state = b.state_dict()
    for key, value in a.state_dict().items():
        if not key.startswith(but):
            assert torch.equal(value, state[key]), key


LAYOUTS: dict[str, tuple[Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "own": (dict, "pytorch-i3d"),
    "old piergiaj, without counters": (without_counters, "pytorch-i3d"),
    "hassony": (as_hassony, "kinetics_i3d_pytorch"),
    "old hassony": (lambda state: as_hassony(without_counters(state)), "kinetics_i3d_pytorch"),
    "data parallel": (lambda state: {f"module.{k}": v for k, v in state.items()}, "pytorch-i3d"),
    "wrapped": (lambda state: {"epoch": 3, "state_dict": dict(state)}, "pytorch-i3d"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zip_format", [True, False])
def test_published_layouts_load_whole(tmp_path: Path, layout: str, zip_format: bool) -> None:
    convert, reported = LAYOUTS[layout]
    source, target = network(1), network(2)
    path = tmp_path / "rgb.pt"
    torch.save(convert(source.state_dict()), path, _use_new_zipfile_serialization=zip_format)
    report = load_weights(target, path)
    assert_same(source, target)
    assert (report.layout, report.new_head, report.file_classes) == (reported, False, 7)
    assert report.loaded in (len(source.state_dict()), len(without_counters(source.state_dict())))


def test_safetensors_load_by_suffix(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    save_file(source.state_dict(), tmp_path / "i3d.safetensors")
    assert not load_weights(target, tmp_path / "i3d.safetensors").new_head
    assert_same(source, target)


def test_of_a_whole_rev2net_the_encoder_is_taken(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    whole = Rev2Net(source, (8, 32, 32))
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    report = load_weights(target, tmp_path / "whole.pt")
    assert_same(source, target)
    assert len(report.ignored) + report.loaded == len(whole.state_dict())
    assert report.ignored
    assert not any(key.startswith("encoder.") for key in report.ignored)


@pytest.mark.parametrize("convert", [dict, as_hassony])
def test_another_number_of_classes_keeps_the_fresh_head_and_says_so(
    tmp_path: Path, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    source, target = network(1, classes=400), network(2, classes=5)
    head = {k: v.clone() for k, v in target.logits.state_dict().items()}
    torch.save(convert(source.state_dict()), tmp_path / "k400.pt")
    report = load_weights(target, tmp_path / "k400.pt")
    assert (report.new_head, report.file_classes) == (True, 400)
    assert "400 classes" in str(report)
    assert all(torch.equal(v, head[k]) for k, v in target.logits.state_dict().items())
    assert_same(source, target, but="logits.")


def test_a_file_without_a_head_loads_as_a_trunk(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    torch.save({k: v for k, v in source.state_dict().items() if "logits" not in k}, tmp_path / "trunk.pt")
    report = load_weights(target, tmp_path / "trunk.pt")
    assert (report.new_head, report.file_classes) == (True, None)
    assert_same(source, target, but="logits.")


@pytest.mark.parametrize("convert", [dict, as_hassony])
def test_flow_weights_fit_flow_networks_only(
    tmp_path: Path, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    flow, rgb = network(1, channels=2), network(2, channels=3)
    torch.save(convert(flow.state_dict()), tmp_path / "flow.pt")
    torch.save(convert(rgb.state_dict()), tmp_path / "rgb.pt")
    with pytest.raises(UserError, match=r"3 \(RGB\) input channels, but the network takes 2 \(flow\)"):
        load_weights(network(3, channels=2), tmp_path / "rgb.pt")
    with pytest.raises(UserError, match=r"2 \(flow\) input channels, but the network takes 3 \(RGB\)"):
        load_weights(network(3, channels=3), tmp_path / "flow.pt")
    target = network(3, channels=2)
    load_weights(target, tmp_path / "flow.pt")
    assert_same(flow, target)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, form: str) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {**network(1).state_dict(), "logits.conv3d.bias": Malicious(trace)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"a": Malicious(trace)}, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    target = network(2)
    with pytest.raises(UserError, match="could run code while they load"):
        load_weights(target, path)
    assert not trace.exists()
    assert_same(target, network(2))
    if not form.startswith("pickle"):
        with pytest.raises(UserError, match=r"\((posix|nt)\.mkdir\)"):
            load_weights(target, path)


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(1), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"rev2net\.models\.i3d\.I3D.*state_dict alone"):
        read_tensors(tmp_path / "module.pt")


def test_p12_files_that_are_no_checkpoints_get_one_sentence(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(network(1).state_dict(), whole)
    contents = {
        "text.pt": b"hello world\n",
        "empty.pt": b"",
        "bytes.pth": b"\x00\x01\xff" * 100,
        "half.pt": whole.read_bytes()[: whole.stat().st_size // 2],
        "text.safetensors": b"hello world, hello world",
        "empty.safetensors": b"",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a checkpoint") as error:
            read_tensors(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    for name, value in {"list.pt": [1, 2], "number.pt": {"a": 1}, "nothing.pt": {}}.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(UserError, match="is not a checkpoint"):
            read_tensors(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.pt does not exist"):
        read_tensors(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path)


def test_p12_a_mismatch_names_the_first_key_and_leaves_the_network_untouched(tmp_path: Path) -> None:
    state = network(1).state_dict()
    missing = {k: v for k, v in state.items() if k != "Mixed_4d.b2b.bn.running_var"}
    unknown = {**state, "Mixed_6a.b0.conv3d.weight": torch.zeros(1)}
    wider = network(1, width=0.25).state_dict()
    unknown_branch = {**as_hassony(state), "mixed_3b.branch_4.conv3d.weight": torch.zeros(1)}
    image = {"inception3a.branch1.conv.weight": torch.zeros(64, 192, 1, 1)}
    for name, content, message in (
        ("missing", missing, r"lacks 'Mixed_4d\.b2b\.bn\.running_var'"),
        ("unknown", unknown, r"'Mixed_6a\.b0\.conv3d\.weight' is unknown"),
        ("wider", wider, r"'Conv3d_1a_7x7\.conv3d\.weight' has the shape \(16, 3, 7, 7, 7\).*\(8, 3, 7, 7, 7\)"),
        ("branch", unknown_branch, r"'mixed_3b\.branch_4\.conv3d\.weight' is unknown"),
        ("image", image, "ImageNet start"),
    ):
        target = network(2)
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            load_weights(target, path)
        assert "\n" not in str(error.value)
        assert_same(target, network(2))
