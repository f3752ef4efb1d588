"""Fixtures of all tests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow_server import MlflowServer
from slurm import Slurm, missing
from tiny import TINY, Trained, run

from dataloaders.locks import lock

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """One thread (two files of tests run at a time on few cores), and nothing of the user's own server or launcher."""
    torch.set_num_threads(1)
    for name in ("MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest trainings first, and tests of one process beside them: two files run at a time (make test)."""
    order = {"chaos": 0, "dataloaders": 1}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real clips are not here: no folder {name} in ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """Real clips (weizmann, skateboard, ucf101, hmdb51, kinetics400); skips where they are absent."""
    return _shared("videos")


@pytest.fixture(scope="session")
def shared_annotations() -> Path:
    """Official and project lists for the real clips; skips where they are absent."""
    return _shared("annotations")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a `rev2net` command that is a user's mistake; its one sentence."""
    from rev2net.cli import main

    def run(*command: str) -> str:
        assert main(list(command)) == 2
        error = capsys.readouterr().err.strip()
        assert error and len(error.splitlines()) == 1 and "Traceback" not in error, error
        return error

    return run


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    """A server that is not started yet."""
    made = MlflowServer(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def record() -> Callable[[str, str, str], None]:
    """Keep one row of the table in docs/reliability.md: the fault, what happened, what was lost."""

    def keep(fault: str, happened: str, lost: str) -> None:
        table = os.environ.get("REV2NET_CHAOS_TABLE")
        if table:
            with Path(table).open("a") as file:
                file.write(json.dumps({"fault": fault, "happened": happened, "lost": lost}) + "\n")

    return keep


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once for all processes of a session; whoever wants it meanwhile waits."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    root = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with lock(folder):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed in the middle
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_data(once: Callable[..., Path]) -> Path:
    """Generated clips of 8 classes (2 for training and 1 for validation each), prepared as VP9 with flow."""
    from rev2net.cli import main

    def make(folder: Path) -> None:
        clips, data = str(folder / "clips"), str(folder / "data")
        assert main(["synth", clips, "--clips-per-class", "2", "--val-per-class", "1", "--frames", "12"]) == 0
        assert main(["prepare", "folder", clips, data, "--codec", "vp9", "--short-side", "128"]) == 0

    return once("tiny", make) / "data"


@pytest.fixture(scope="session")
def trained(tiny_data: Path, once: Callable[..., Path]) -> Trained:
    """A tiny Rev2Net, 6 steps on two processes through the deepspeed launcher, ZeRO-1; nothing is written to it."""
    command = ["deepspeed", "--num_gpus", "2", "--module", "rev2net", "train", "configs/demo.yaml", *TINY]
    command += [f"data.path={tiny_data}", "profile.steps=2-3"]

    def make(folder: Path) -> None:
        (folder / "stdout").write_text(run(*command, f"output={folder}/tiny").stdout)

    folder = once("trained", make)
    return Trained(folder / "tiny", (folder / "stdout").read_text(), (*command, f"output={folder}/tiny"))


@pytest.fixture(scope="session")
def other_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set of the same classes, for a target domain: what is for training there is for validation here."""
    folder = tmp_path_factory.mktemp("other") / "data"
    shutil.copytree(tiny_data, folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    splits = manifest["splits"]
    manifest["splits"] = {"train": splits["val"], "val": splits["train"]}
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


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
