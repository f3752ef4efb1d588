"""Real jobs on a real Slurm of two nodes on this machine (see slurm.py); skipped, with the reason, elsewhere."""

from __future__ import annotations

import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from slurm import Slurm
from tiny import ROOT, TINY, run

from cluster.cli import main
from cluster.jobs import read_jobs

STEPS = 30


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site file for the lower of the two partitions."""
    path = tmp_path / "site.yaml"
    path.write_text(
        "partition: low\ntime_minutes: 20\nsignal_delay_s: 30\nenv: {OMP_NUM_THREADS: 1, DS_ACCELERATOR: cpu}\n"
    )
    return path


def test_an_array_prepares_the_bytes_of_one_run(
    slurm: Slurm,
    site: Path,
    clips: Path,
    has_the_bytes_of_one_run: Callable[[Path], bool],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, jobs = tmp_path / "data", tmp_path / "jobs"
    words = ["prepare", "folder", str(clips), str(data), "--short-side", "64", "--workers", "1", "--tasks", "2"]
    assert main([*words, "--site", str(site), "--folder", str(jobs)]) == 0
    first, last = re.findall(r"job (\d+)", capsys.readouterr().out)
    slurm.wait_for_end(last)
    (folder,) = jobs.iterdir()
    assert f"{data}: prepared" in (folder / f"{last}_0_log.out").read_text()
    for task in (0, 1):
        assert main(["logs", first, "--rank", str(task), "--folder", str(jobs)]) == 0
        assert f"share {task + 1}/2 is done" in capsys.readouterr().out
    assert has_the_bytes_of_one_run(data)
    assert main(["status", last, "--folder", str(jobs)]) == 0
    assert f"{folder.name}  FINISHED  2/2 shares" in capsys.readouterr().out


def test_the_doctor_looks_at_every_node_and_reduces_over_them(
    slurm: Slurm, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.tar").write_bytes(bytes(1 << 20))
    words = ["doctor", "--nodes", "2", "--tasks-per-node", "1", "--site", str(site), "--folder", str(tmp_path / "jobs")]
    words = [sys.executable, "-m", "cluster.cli", *words, "--storage", str(tmp_path / "data")]
    # From a shell that is a job of Slurm's itself, with its binding, and with the place of another training's ranks.
    shell = ["srun", "--partition", "low", "--ntasks-per-node", "1", "--cpu-bind", "cores"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run(*shell, "env", f"MASTER_PORT={taken.getsockname()[1]}", *words).stdout
    assert re.search(r"^ok +torch +\S+ \(all 2 nodes\)$", said, re.MULTILINE)
    assert re.search(r"^ok +all-reduce, 2 x gloo +bus bandwidth 1 MiB ", said, re.MULTILINE)
    assert re.search(r"^ok +storage +read 1 MB .*\((?:n1|all 2 nodes)\)$", said, re.MULTILINE)
    assert main(["status", "--folder", str(tmp_path / "jobs")]) == 0
    assert "rev2net-doctor" in (said := capsys.readouterr().out) and "FINISHED" in said


def test_a_job_that_waits_runs_the_code_it_was_submitted_with(
    slurm: Slurm, tmp_path: Path, site: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Meanwhile the checkout is edited, and a second job is cancelled. Relative paths are those of the submission."""
    checkout, jobs = tmp_path / "checkout", ["--folder", str(tmp_path / "checkout" / "jobs")]
    for package in ("cluster", "rev2net", "dataloaders"):
        shutil.copytree(ROOT / package, checkout / package)
    shutil.copytree(ROOT / "configs", checkout / "configs")
    blocker = slurm.command("sbatch", "--parsable", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 900")
    assert blocker
    words = ["submit", "configs/demo.yaml", "--tasks-per-node", "2", "--site", str(site), "data.path=nowhere"]
    words += ["--folder", "jobs"]
    first, second = (
        run(sys.executable, "-m", "cluster.cli", *words, f"output={name}", cwd=checkout).stdout.split()[1].rstrip(":")
        for name in ("first", "second")
    )
    for file in (*checkout.glob("*/task.py"), *checkout.glob("*/train.py")):
        file.write_text("raise SystemExit('the checkout was edited')")

    def status(*jobs_: str) -> str:
        assert main(["status", *jobs_, *jobs]) == 0
        return capsys.readouterr().out

    assert re.findall(rf"(?m)^({first}|{second}) .* PENDING .*\((?:Resources|Priority|None)\)$", status()) == [
        first,
        second,
    ]
    assert main(["cancel", second, *jobs]) == 0
    assert f"cancelled: {second}" in capsys.readouterr().out
    slurm.wait_for_end(second)
    assert "STOPPED" in status(second)
    assert f"running or waiting: {first}" in refused("cancel", second, *jobs)
    slurm.command("scancel", blocker)
    slurm.wait_for_end(first)
    assert re.search(r"FAILED .*nowhere does not exist", status(first))
    assert main(["logs", first, "--stderr", *jobs]) == 0
    assert "the checkout was edited" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ("partition: gpu", [], r"invalid partition.* gpu; .*the partitions here are low \(2 nodes\), high \(2 nodes\)"),
        ("{}", ["--nodes", "3"], r"--nodes 3 is more than there are"),
        ("partition: low", ["--nodes", "3"], r"--nodes 3 is more than there are; .*low \(2 nodes\)"),
    ],
)
def test_p12_what_slurm_refuses_is_one_sentence(
    slurm: Slurm, settings: str, options: list[str], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(settings)
    words = ["submit", "configs/demo.yaml", "--tasks-per-node", "1", "--site", str(site), *options]
    words += ["train.global_batch=24", "--folder", str(tmp_path / "jobs")]
    assert re.search(expected, refused(*words))
    assert list((tmp_path / "jobs").iterdir()) == []


def test_p7_a_preempted_job_goes_on_and_trains_the_same_weights(
    slurm: Slurm, site: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes, one rank on each; a job of the higher partition takes both in the middle of the training."""

    def submit(name: str) -> str:
        words = ["submit", "configs/demo.yaml", "--nodes", "2", "--tasks-per-node", "1", "--site", str(site)]
        words += ["--folder", str(tmp_path / "jobs"), f"data.path={tiny_data}", f"output={tmp_path / name}", *TINY]
        words += [f"train.duration={STEPS}steps", f"train.checkpoint_every={STEPS}steps"]
        assert main(words) == 0
        return re.findall(r"job (\d+)", capsys.readouterr().out)[0]

    slurm.wait_for_end(submit("whole"))
    job = submit("preempted")
    log = tmp_path / "preempted" / "train.log"
    slurm.wait("first step", lambda: log.exists() and f"step 1/{STEPS}" in log.read_text(), 400)
    words = ("sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    with slurm.stopped_until_signalled(read_jobs(tmp_path / "jobs")[-1].path):
        other = slurm.command(*words)
        assert other
    slurm.wait_for_end(other)
    slurm.wait_for_end(job)
    assert "stopped at step" in log.read_text() and "going on from" in log.read_text()
    # No step was done twice: at most one beyond the signal, saved, and gone on from.
    steps = [int(step) for step in re.findall(rf"step (\d+)/{STEPS}", log.read_text())]
    assert steps == list(range(1, STEPS + 1))
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    whole, preempted = (
        load_file(tmp_path / name / f"checkpoints/step-{STEPS:08d}/weights.safetensors")
        for name in ("whole", "preempted")
    )
    assert whole.keys() == preempted.keys()
    assert all(whole[key].equal(preempted[key]) for key in whole)
