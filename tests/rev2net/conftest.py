"""One training of the small generated data set, shared by the tests that need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY, Trained, run
from torch import nn


@pytest.fixture
def exports_and_compiles() -> Callable[..., None]:
    """Whether a network of clips 3x4x32x32 becomes one graph, for any batch, that gives what it gives, to `atol`."""

    def check(model: nn.Module, *, atol: float) -> None:
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (torch.randn(2, 3, 4, 32, 32),), dynamic_shapes=({0: batch},))
        clip = torch.randn(3, 3, 4, 32, 32)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            expected = model(clip)
            torch.testing.assert_close(program.module()(clip), expected, rtol=0, atol=atol)
            torch.testing.assert_close(compiled(clip), expected, rtol=0, atol=atol)

    return check


@pytest.fixture(scope="session")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny Rev2Net, 6 steps on two processes through the deepspeed launcher, ZeRO-1, bf16."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    command = (
        *("deepspeed", "--num_gpus", "2", "--module", "rev2net", "train", "configs/demo.yaml"),
        *(f"data.path={tiny_data}", f"output={output}", "profile.steps=2-3", *TINY),
    )
    return Trained(output, run(*command).stdout, command)
