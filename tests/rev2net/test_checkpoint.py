"""On disk: what is kept, what is put aside, and the commands that look at checkpoints."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, Trained

from dataloaders.errors import UserError
from rev2net import checkpoint
from rev2net.checkpoint import CheckpointWriter, RunState
from rev2net.cli import main
from rev2net.config import load_config
from rev2net.models import I3D
from rev2net.models.build import build_network
from rev2net.snapshot import Snapshot
from rev2net.train import start_from


def snapshot(value: float) -> Snapshot:
    tensors = {"a/b": torch.full((100,), value)}
    return Snapshot(weights=tensors, optimizer=tensors, buffers=tensors)


def state(step: int) -> RunState:
    return RunState(step=step, run_id=None, classes=("a", "b"), world_size=1, config={}, preparation={}, updates=step)


def written(folder: Path, *steps: int, keep: int | None = None) -> list[str]:
    writer = CheckpointWriter(folder)
    for step in steps:
        writer.start(snapshot(step), state(step), keep)
        assert writer.wait() is None
    return [path.name[-2:] for path in checkpoint.checkpoints(folder)]


def test_p6_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    assert written(tmp_path, 1, 2) == ["01", "02"] and checkpoint.best(tmp_path) is None
    first, second = checkpoint.checkpoints(tmp_path)
    assert checkpoint.write_evaluation(first, {"val/top1": 0.5})
    assert not checkpoint.write_evaluation(second, {"val/top1": 0.5})
    assert written(tmp_path, 3, 4, 5, keep=2) == ["01", "04", "05"]
    fifth = checkpoint.find(tmp_path)
    assert checkpoint.write_evaluation(fifth, {"val/top1": 0.6})
    assert checkpoint.find(tmp_path / "best") == fifth == checkpoint.find(tmp_path / "latest")
    assert written(tmp_path, 6, 7, keep=1) == ["05", "07"]
    assert checkpoint.find(tmp_path / "best") == fifth


@pytest.mark.parametrize("how", ["truncated", "flipped", "no state", "file gone"])
def test_p6_a_damaged_checkpoint_is_put_aside(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, 1, 2)
    newest = checkpoint.find(tmp_path)
    file = newest / "optimizer.safetensors"
    if how == "truncated":
        os.truncate(file, 100)
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif how == "no state":
        (newest / "state.json").write_text("{")
    else:
        file.unlink()
    (tmp_path / ".step-00000003.partial").mkdir()
    found = checkpoint.recover(tmp_path)
    assert found is not None and found.name == "step-00000001"
    assert "step-00000002 is damaged" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [".damaged-step-00000002", "latest", "step-00000001"]
    # The run comes there again.
    assert written(tmp_path, 2) == ["01", "02"] and checkpoint.recover(tmp_path) == newest


def test_p6_what_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    written(tmp_path, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "file_sha256", fails)  # a storage server that is away
        with pytest.raises(OSError, match=r"step-00000002 cannot be read .*again once it can"):
            checkpoint.recover(tmp_path)
    found = checkpoint.recover(tmp_path)
    assert found is not None and found.name == "step-00000002"


def test_p6_with_all_checkpoints_damaged_nothing_starts_from_scratch(tmp_path: Path) -> None:
    assert checkpoint.recover(tmp_path) is None
    written(tmp_path, 1)
    (checkpoint.find(tmp_path) / "weights.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="delete that folder to train from the start"):
            checkpoint.recover(tmp_path)


def test_p6_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, 1)
    monkeypatch.setattr(os, "unlink", Mock(side_effect=PermissionError("protected")))  # tests may be run by root
    assert written(tmp_path, 2, keep=1) == ["01", "02"] and "could not be removed: protected" in caplog.text


def test_p6_later_checkpoints_of_steps_that_are_done_again_do_not_push_out_the_new_ones(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 4)
    assert written(tmp_path, 2, keep=1) == ["02", "03", "04"] and checkpoint.find(tmp_path).name == "step-00000002"
    assert written(tmp_path, 3, keep=1) == ["03", "04"] and checkpoint.find(tmp_path).name == "step-00000003"


def test_p6_what_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    written(tmp_path, 1)
    (tmp_path / ".step-00000002.partial").write_text("not a folder")
    writer = CheckpointWriter(tmp_path)
    writer.start(snapshot(2), state(2), None)
    error = writer.wait()
    assert error is not None and "could not be written" in error and not writer.failed
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]


def test_show_and_verify(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(trained.output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "step-00000003", "step-00000006"]
    assert "latest, best" in lines[2] and re.search("ZeRO-1, (bf16|fp32), adamw", lines[2]) and "%" in lines[2]
    assert main(["checkpoint", "show", str(trained.output / "checkpoints" / "best")]) == 0
    assert '"zero_stage": 1' in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(trained.output)]) == 0
    assert capsys.readouterr().out.count(": ok") == 2
    shutil.copytree(trained.output / "checkpoints", tmp_path / "checkpoints")
    os.truncate(tmp_path / "checkpoints" / "step-00000003" / "weights.safetensors", 1000)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "weights.safetensors has 1000 bytes" in capsys.readouterr().out
    (tmp_path / "checkpoints" / "step-00000006" / "state.json").write_text("{")
    assert main(["checkpoint", "show", str(tmp_path)]) == 0
    assert "step-00000006   cannot be read" in capsys.readouterr().out
    (tmp_path / "checkpoints" / "step-00000006" / "state.json").unlink()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("step-00000006: FileNotFoundError") == 1


def test_damaged_weights_are_refused_by_whoever_wants_them(
    trained: Trained, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(trained.output / "checkpoints", tmp_path / "checkpoints")
    weights = checkpoint.find(tmp_path) / "weights.safetensors"
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")  # not a number
    for command in (["predict", str(tmp_path), "x.mp4"], ["export", str(tmp_path), str(tmp_path / "x.onnx")]):
        assert "does not have the hash that it was written with" in refused(*command)
    words = ["checkpoint", "export-weights", str(tmp_path), str(tmp_path / "x.pt")]
    assert "is damaged" in refused(*words) and "is damaged" in refused(*words, "--all")
    with pytest.raises(UserError, match="is damaged"):
        start_from(build_network(load_config("configs/demo.yaml", TINY), 8), str(tmp_path), ())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_exported_weights_are_those_of_a_bare_i3d(trained: Trained, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"i3d.{ending}"
    assert main(["checkpoint", "export-weights", str(trained.output), str(out)]) == 0
    weights = load_file(out) if ending == "safetensors" else torch.load(out, weights_only=True)
    I3D(8, width=0.25).load_state_dict(weights)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    whole = tmp_path / "all.safetensors"
    assert main(["checkpoint", "export-weights", str(trained.output), str(whole), "--all"]) == 0
    assert load_file(whole).keys() > {f"encoder.{name}" for name in weights}


def test_p12_mistakes_are_one_sentence(trained: Trained, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no checkpoint at" in refused("checkpoint", "show", str(tmp_path))
    said = refused("checkpoint", "export-weights", str(trained.output), "x.onnx")
    assert "does not end in .safetensors or .pt" in said
    assert "is no folder" in refused("checkpoint", "export-weights", str(trained.output), f"{tmp_path}/a/x.pt")
    old = tmp_path / "step-00000001"
    old.mkdir()
    (old / "state.json").write_text(json.dumps({"format": 2}))
    assert "another checkpoint format" in refused("checkpoint", "show", str(old))
