"""Fixtures of the tests of networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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
