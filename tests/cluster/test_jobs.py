"""The folder of a job, and `status`, `logs` and `cancel`: on this machine here, on a real Slurm in test_slurm.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import ROOT, TINY, environment, wait

from cluster.cli import main
from cluster.jobs import CODE, Job, new_folder, read_jobs, record
from dataloaders.errors import UserError
from rev2net.config import load_config


def make(parent: Path, name: str, submitted: str, number: str) -> Path:
    """The folder of a job that was started on this machine and is over."""
    with new_folder(parent, name, "x") as folder:
        record(folder, Job(ids=(number,), ranks=2, kind="train", name=name, output=str(parent / "out"),
                           executor="local", submitted=submitted))  # fmt: skip
    return folder


def test_two_jobs_of_one_second_have_folders_of_their_own_with_the_code(tmp_path: Path) -> None:
    folders = [make(tmp_path, "rev2net-demo", f"2026-11-23T14:15:0{n}", str(n)) for n in range(3)]
    assert len(set(folders)) == 3
    assert [each.path for each in read_jobs(tmp_path)] == folders
    for package in ("cluster", "rev2net", "dataloaders"):
        for file in (ROOT / package).rglob("*"):
            copy = folders[0] / CODE / file.relative_to(ROOT)
            assert copy.exists() == ("__pycache__" not in file.parts), copy
            assert not copy.is_file() or copy.read_bytes() == file.read_bytes()


def test_a_job_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError), new_folder(tmp_path, "x"):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []


def test_status_has_the_newest_last_and_takes_numbers_and_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = make(tmp_path, "new", "2026-11-23T14:15:09", "1"), make(tmp_path, "old", "2026-11-22T14:15:09", "2")
    (new / "1_0_log.out").write_text("begins\n")
    (new / "1_0_log.err").write_text("a warning\nsrun: error: n1: task 1: Exited with exit code 1\n")
    (new / "1_1_log.err").write_text("out of memory\nsrun: error: Terminated\n")
    for number, reason in (("3", ""), ("4", " DUE TO TIME LIMIT")):
        folder = make(tmp_path, "ended", f"2026-11-21T14:15:0{number}", number)
        line = f"slurmstepd: error: *** JOB {number} ON n1 CANCELLED AT 2026-11-21T15:00:00{reason} ***\n"
        (folder / f"{number}_0_log.err").write_text(f"a warning\n{line}")
    assert main(["status", "--folder", str(tmp_path)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[::2][:2] for line in lines] == [
        ["3", "STOPPED"], ["4", "FAILED"], ["2", "STOPPED"], ["1", "FAILED"],
    ]  # fmt: skip
    assert lines[2].split()[1] == old.name and lines[3].endswith("  rank 1: out of memory")
    assert main(["status", "2", old.name, "--folder", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cancel", "99"], "no job '99'"),
        (["cancel", "99"], "the newest there are 2 (b-"),
        (["cancel", "1"], "job 1 is over (STOPPED): there is nothing to cancel; no job runs or waits"),
        (["cancel"], "required: JOB"),
        (["logs", "1"], "rank 0 of job 1 has written nothing: the job is STOPPED"),
        (["logs", "1", "--rank", "2"], "has the ranks 0 to 1"),
        (["logs", "1", "2"], "'2' is not an option of logs"),
        (["status", "a"], "no job 'a'"),
        (
            ["cancel", "7_1"],
            "7_1 is a task of job 7: give 7 for all of them; its log is that of --rank 2, and `scancel",
        ),
    ],
)
def test_p12_mistakes_are_one_sentence(
    words: list[str], expected: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    make(tmp_path, "a", "1", "1")
    make(tmp_path, "b", "2", "2")
    with new_folder(tmp_path, "array", "x") as folder:
        record(folder, Job(ids=("7_0", "7_1"), ranks=2, kind="sweep", name="array", output=str(tmp_path / "out"),
                           executor="local", submitted="0"))  # fmt: skip
    assert expected in refused(*words, "--folder", str(tmp_path))


def test_a_training_on_this_machine_is_watched_cancelled_and_finished(
    tiny_data: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, output = ["--folder", str(tmp_path / "jobs")], tmp_path / "out"
    words = ["submit", "configs/demo.yaml", "--executor", "local", "--tasks-per-node", "2", *jobs, *TINY]
    words += [f"data.path={tiny_data}", f"output={output}", "optim.schedule=constant"]
    words += ["model.name=i3d", "loss.ddp=none", "loss.ddp_low_from=0"]

    def status(job: str) -> str:
        capsys.readouterr()
        assert main(["status", job, *jobs]) == 0
        return capsys.readouterr().out.splitlines()[1]

    log, code = output / "train.log", [sys.executable, "-m", "cluster.cli"]
    with in_background(*code, *words, "train.duration=9999steps") as submit:
        wait("step 2", lambda: (log.exists() and "step 2/9999" in log.read_text()) or submit.poll() is not None)
        (folder,) = (tmp_path / "jobs").iterdir()
        job = json.loads((folder / "job.json").read_text())["ids"][0]
        row = status(job)
        assert "RUNNING  step " in row and "/9999 ETA " in row and f"process {job}" in row
        assert f"job {job} (RUNNING) trains in {output}: wait until it has ended" in refused(*words)
        assert main(["cancel", folder.name, *jobs]) == 0
        assert submit.wait(timeout=240) == 1
    assert "STOPPED" in status(job) and "the state is saved" in status(job)
    assert "is over (STOPPED)" in refused("cancel", job, *jobs)
    assert main(["logs", job, *jobs]) == 0
    assert "stopped at step" in capsys.readouterr().out
    config = load_config(folder / "config.yaml")
    assert config.output == str(output) and config.train.duration == "9999steps"
    # It goes on from where it was stopped, to the end, followed by whoever wants to.
    done = max(int(line.split("/")[0].split()[-1]) for line in log.read_text().splitlines() if "/9999 (" in line)
    assert main([*words, f"train.duration={done + 2}steps"]) == 0
    (newest,) = (each for each in (tmp_path / "jobs").iterdir() if each != folder)
    assert f"FINISHED  step {done + 2}/{done + 2} ETA 0s" in status(newest.name)
    assert main(["logs", newest.name, "--follow", *jobs]) == 0
    assert f"going on from {output}" in capsys.readouterr().out
    (output / "config.yaml").write_text("another job trains here now")
    assert "FINISHED" in status(newest.name) and "step" not in status(newest.name) and "STOPPED" in status(job)


@contextmanager
def in_background(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that nobody waits for where the block fails: it is killed then, with its ranks."""
    env = environment()
    env["PYTHONPATH"] = f"{ROOT}:{env['PYTHONPATH']}"
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        yield process
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
