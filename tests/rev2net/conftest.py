"""One small generated data set and one training of it, shared by the tests that need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import TINY, Trained, run

from rev2net.cli import main


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The volumes of unit tests are too small to share among threads, least of all on a machine that has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated clips of 8 classes (2 for training and 1 for validation each), prepared as VP9 with flow."""
    folder = tmp_path_factory.mktemp("tiny")
    assert (
        main(["synth", str(folder / "clips"), "--clips-per-class", "2", "--val-per-class", "1", "--frames", "12"]) == 0
    )
    prepare = [
        "prepare",
        "folder",
        str(folder / "clips"),
        str(folder / "data"),
        "--codec",
        "vp9",
        "--short-side",
        "128",
    ]
    assert main(prepare) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny Rev2Net, 6 steps on two processes through the deepspeed launcher, ZeRO-1, bf16."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    command = (
        *("deepspeed", "--num_gpus", "2", "--module", "rev2net", "train", "configs/demo.yaml"),
        *(f"data.path={tiny_data}", f"output={output}", "profile.steps=2-3", *TINY),
    )
    return Trained(output, run(*command).stdout, command)
