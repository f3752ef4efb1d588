"""One training of the small generated data set, shared by the tests that need it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import TINY, Trained, run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The volumes of unit tests are too small to share among threads, least of all on a machine that has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny Rev2Net, 6 steps on two processes through the deepspeed launcher, ZeRO-1, bf16."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    command = (
        *("deepspeed", "--num_gpus", "2", "--module", "rev2net", "train", "configs/demo.yaml"),
        *(f"data.path={tiny_data}", f"output={output}", "profile.steps=2-3", *TINY),
    )
    return Trained(output, run(*command).stdout, command)
