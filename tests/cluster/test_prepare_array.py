"""`rev2net-cluster prepare`: its script against a golden file, and real tasks on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import main

GOLDEN = Path(__file__).parent / "golden" / "prepare.sh"


def test_dry_run_prints_the_golden_script(script: Callable[..., str]) -> None:
    words = ("prepare", "folder", "videos", "data", "--flow-device", "cuda", "--tasks", "64")
    assert script(*words) == GOLDEN.read_text()


def test_tasks_on_this_machine_make_the_bytes_of_one_run(
    clips: Path, has_the_bytes_of_one_run: Callable[[Path], bool], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    options = ["--short-side", "64", "--workers", "1"]
    jobs = ["--tasks", "2", "--executor", "local", "--folder", str(tmp_path / "jobs")]
    assert main(["prepare", "folder", str(clips), str(data), *options, *jobs]) == 0
    out = capfd.readouterr().out
    assert "16 clips" in out and "submitit" not in out
    assert has_the_bytes_of_one_run(data)
    # Each task left its log, and did half of the work.
    logs = [file.read_text() for file in (tmp_path / "jobs").glob("*/*_log.out")]
    assert sum("share 1/2 is done" in log and "8 clips" in log for log in logs) == 1
    assert sum("share 2/2 is done" in log and "8 clips" in log for log in logs) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["folder", "clips", "data"], "required: --tasks"),
        (["folder", "clips", "data", "--tasks", "0"], "--tasks 0 is not possible"),
        (["folder", "clips", "data", "--tasks", "2", "--share", "1/2"], "--share is what each of the tasks gets"),
        (["folder", "clips", "data", "--tasks", "2"], "clips does not exist"),
        (["folder", "clips", "data", "--tasks", "2", "--flow-scal", "2"], "--flow-scale: invalid choice"),
        (["fodler", "clips", "data", "--tasks", "2"], "invalid choice: 'fodler'"),
        (["folder", "real", "data", "--tasks", "2", "--size", "350x256"], "350 is not a multiple of 16"),
        (["folder", "real", "data", "--tasks", "2", "--fps", "fast"], "--fps is 'fast'"),
        (["folder", "real", "data", "--tasks", "2"], "no sbatch"),
        (["folder", "real", "data", "--tasks", "2", "--executor", "local", "--dry-run"], "--dry-run shows"),
    ],
)
def test_p12_mistakes_are_one_sentence(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))  # No Slurm, also where one is installed.
    Path("real/a").mkdir(parents=True)
    Path("real/a/1.mp4").touch()
    assert expected in refused("prepare", *words)
    assert not Path("data").exists() and not Path("runs").exists()
