"""Fixtures of the cluster's tests."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a `rev2net-cluster` command that is a user's mistake; its one sentence."""

    def run(*words: str) -> str:
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
        return captured.err

    return run


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The script that a command would submit, without what differs between machines."""

    def run(*words: str) -> str:
        folder = tmp_path / "jobs"
        assert main([*words, "--dry-run", "--folder", str(folder)]) == 0
        assert not folder.exists()
        text = capsys.readouterr().out
        return text.replace(str(folder), "FOLDER").replace(shlex.quote(sys.executable), "PYTHON")

    return run
