"""`rev2net-cluster sweep`: its script against a golden file, and real tasks on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import ROOT, TINY, wait

from cluster.cli import main
from rev2net.grid import Search

GOLDEN = Path(__file__).parent / "golden" / "sweep.sh"
DEMO = str(ROOT / "configs" / "demo.yaml")


def test_dry_run_prints_the_golden_script(script: Callable[..., str]) -> None:
    assert script("sweep", DEMO, "train.seed=1", "--tasks", "6", "--gpus-per-node", "2") == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "2", "--gpus-per-node", "1"], "no sbatch"),
        (["--gpus-per-node", "1"], "required: --tasks"),
        (["--tasks", "0", "--gpus-per-node", "1"], "--tasks 0 is not possible"),
        (["--tasks", "2"], "--gpus-per-node G"),
        (["--tasks", "2", "--gpus-per-node", "3", "--dry-run"], "take 1 or 2 tasks"),
        (["--tasks", "2", "--gpus-per-node", "1", "--nodes", "2"], "'--nodes' is not an option of sweep"),
        (["--tasks", "2", "--gpus-per-node", "1", "model.name=i3d", "loss.ddp=none"], "no weight to search"),
        (["--tasks", "2", "--gpus-per-node", "1", "--executor", "local", "--dry-run"], "--dry-run shows"),
    ],
)
def test_p12_mistakes_are_one_sentence(
    options: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))  # No Slurm, also where one is installed.
    assert expected in refused("sweep", DEMO, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.chaos
def test_p7_a_task_goes_on_with_its_run_after_a_signal(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGUSR2 reaches it in a training: it saves, starts again, goes on with that run and then with the other one."""
    grids = Search(weights=("lambda_im",), start=(0.1,), coarse=(0.0, 0.1), fine=(1.0,))
    monkeypatch.setattr(Search, "of", lambda *_, **__: grids)
    for name, value in (("OMP_NUM_THREADS", "1"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    keys = [f"data.path={tiny_data}", f"output={tmp_path}/run", "model.flow_decoder=false", "loss.ddp=none", *TINY]
    keys += ["train.duration=12steps"]
    jobs = tmp_path / "jobs"
    words = ["sweep", DEMO, *keys, "--tasks", "1", "--tasks-per-node", "1", "--executor", "local"]
    with ThreadPoolExecutor() as thread:
        status = thread.submit(main, [*words, "--folder", str(jobs)])
        logs = [tmp_path / "run-sweep" / name / "train.log" for name in ("lambda_im0", "lambda_im0.1")]
        wait("a first step", lambda: logs[0].exists() and "step 1/12" in logs[0].read_text())
        for out in jobs.glob("*/*_0_log.out"):
            leader = out.name.partition("_")[0]
            for task in Path(f"/proc/{leader}/task/{leader}/children").read_text().split():
                os.kill(int(task), signal.SIGUSR2)
        assert status.result() == 0
    texts = [log.read_text() for log in logs]
    assert ["stopped at step" in text and "going on from" in text for text in texts] == [True, False]
    assert all(len(re.findall(r"step \d+/12 ", text)) == 12 for text in texts)
    assert json.loads((tmp_path / "run-sweep" / "result.json").read_text())["winner"]
    (out,) = jobs.glob("*/*_0_log.out")
    assert "winner loss.lambda_im=" in out.read_text()
    capsys.readouterr()
    assert main(["status", "--folder", str(jobs)]) == 0
    assert "rev2net-sweep-demo" in (line := capsys.readouterr().out) and "FINISHED" in line and "2 runs begun" in line
