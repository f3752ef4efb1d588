"""Fixtures of the cluster's tests."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm import Slurm, missing

from cluster.cli import main
from dataloaders.prepare import prepare
from dataloaders.shards import MANIFEST
from dataloaders.sources import read_folder
from dataloaders.synth import SynthSettings, synthesise
from dataloaders.transcode import PrepareSettings
from dataloaders.verify import verify


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


@pytest.fixture(scope="session")
def slurm_daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A real Slurm of two nodes; skips where it cannot be had."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"no real Slurm here: {reason}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def slurm(slurm_daemons: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The same, as the Slurm that commands find."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_daemons.conf))
    yield slurm_daemons
    slurm_daemons.cancel_all()
