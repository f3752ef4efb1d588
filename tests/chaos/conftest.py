"""Fixtures of the chaos suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training import Training


@pytest.fixture(scope="session")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Training]:
    """The same training without any fault; made once for each configuration."""
    made: dict[tuple[str, ...], Training] = {}

    def get(*words: str, ranks: int = 2) -> Training:
        key = (*words, str(ranks))
        if key not in made:
            output = tmp_path_factory.mktemp("undisturbed") / "run"
            made[key] = Training(tiny_data, output, *words, ranks=ranks).start().finish()
        return made[key]

    return get


@pytest.fixture
def training(tiny_data: Path, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Makes trainings that are to be hurt; whatever is left of them is killed."""
    made: list[Training] = []

    def make(*words: str, data: Path = tiny_data, name: str = "run", ranks: int = 2) -> Training:
        made.append(Training(data, tmp_path / name, *words, ranks=ranks))
        return made[-1]

    yield make
    for each in made:
        each.close()
