"""Fixtures of the cluster's tests."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import main
from dataloaders.prepare import prepare
from dataloaders.shards import MANIFEST
from dataloaders.sources import read_folder
from dataloaders.synth import SynthSettings, synthesise
from dataloaders.transcode import PrepareSettings
from dataloaders.verify import verify


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a `rev2net-cluster` command that is a user's mistake; its one sentence."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def run(*words: str) -> str:
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
        return captured.err

    return run


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The script that a command would submit, without what differs between machines."""
    monkeypatch.setenv("REV2NET_COMMIT", "COMMIT")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def run(*words: str) -> str:
        folder = tmp_path / "jobs"
        assert main([*words, "--dry-run", "--folder", str(folder)]) == 0
        assert not folder.exists()
        text = capsys.readouterr().out
        text = text.replace(str(folder), "FOLDER").replace(shlex.quote(sys.executable), "PYTHON")
        text = re.sub(r"-\d{8}-\d{6}\b", "-TIME", text)
        return text.replace(str(Path.cwd()), "CWD")

    return run


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """16 generated clips of four frames."""
    synthesise(tmp_path / "clips", SynthSettings(frames=4, size=64), {"train": 1, "val": 1}, workers=1)
    return tmp_path / "clips"


@pytest.fixture
def has_the_bytes_of_one_run(clips: Path, tmp_path: Path) -> Callable[[Path], bool]:
    """Whether a data set made of `clips` is the one that `prepare` makes of them by itself."""

    def same(data: Path) -> bool:
        whole = tmp_path / "whole"
        prepare(read_folder(clips), whole, PrepareSettings(short_side=64))
        # The manifest holds the hash of every shard.
        return (data / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes() and verify(data) == []

    return same
