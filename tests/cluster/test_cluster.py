"""The cluster package: scripts against golden files, and real tasks, signals and requeues on this machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
import torch
from submitit.slurm.slurm import SlurmJobEnvironment
from tiny import wait

from cluster import task
from cluster.cli import main
from cluster.doctor import diagnose
from cluster.doctor_nodes import DoctorTask, _node_rows, _reduce_rows
from cluster.site import Site, load_site
from cluster.submit import Placement, _requeue_lines, check_accelerator, local_gpus, submit_local, wait_local
from cluster.task import Task, TrainWork, check_gpus
from dataloaders.errors import UserError
from rev2net.config import load_config

GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = Path(__file__).parents[2] / "configs" / "cluster" / "example.yaml"
CONTAINER = GOLDEN / "container.yaml"

# The tasks below run in processes that cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("output: out\ndata:\n  path: data\ntrain:\n  global_batch: 64\n  micro_batch: 8\n")
    return path


def test_nodes_that_tell_the_doctor_nothing_are_counted(tmp_path: Path) -> None:
    rows = [{"name": "torch", "state": "ok", "text": "3.0"}]
    (tmp_path / "node-0.json").write_text(json.dumps({"node": "n1", "rows": rows}))
    found = [*_node_rows(tmp_path, 2), *_reduce_rows(tmp_path, "the job ended before: out of memory")]
    assert [(row.name, row.state) for row in found] == [("torch", "ok"), ("nodes", "FAIL"), ("all-reduce", "FAIL")]
    assert found[0].text == "3.0 (n1)" and "1 of 2 told nothing" in found[1].text and "out of memory" in found[2].text
    bad = {"node": "n2", "rows": [{"name": "all-reduce, 2 x nccl", "state": "FAIL", "text": "rank 1 on n2: no route"}]}
    (tmp_path / "all-reduce-0.json").write_text(json.dumps({"node": "n1", "rows": rows}))
    (tmp_path / "all-reduce-1.json").write_text(json.dumps(bad))
    (row,) = _reduce_rows(tmp_path, "")
    assert row.state == "FAIL" and "rank 1 on n2: no route (1 ranks failed)" in row.text


def test_the_doctor_looks_at_a_node_that_does_not_see_the_data(tmp_path: Path) -> None:
    rows = DoctorTask(folder=tmp_path, storage=tmp_path / "elsewhere")._look()
    states = {row.name: row.state for row in rows}
    assert states["storage"] == "FAIL" and states["torch"] == states["PyAV codecs"] == "ok"


def test_p12_the_doctor_s_words_for_here_and_for_nodes(refused: Callable[..., str]) -> None:
    assert "give --nodes N too" in refused("doctor", "--gpus-per-node", "2")
    assert "leave one of them out" in refused("doctor", "--nodes", "2", "--processes", "2")
    assert "the number of ranks is open" in refused("doctor", "--nodes", "2")


@pytest.mark.parametrize("command", ["submit", "sweep", "prepare"])
def test_the_examples_of_the_help_make_scripts(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out.splitlines()
    examples = [line.split()[1:] for line in said if line.startswith(f"  rev2net-cluster {command} ")]
    assert examples
    for words in examples:
        if "local" not in words:
            assert main([*words, "--dry-run"]) == 0, words
            assert "#SBATCH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("golden", "options"),
    [
        ("gpus.sh", ["--nodes", "2", "--gpus-per-node", "4", "--site", str(EXAMPLE), "train.seed=1"]),
        ("cpus.sh", ["model.name=i3d", "--tasks-per-node", "2", "loss.ddp=none"]),
        ("container.sh", ["--gpus-per-node", "4", "--site", str(CONTAINER)]),
    ],
)
def test_dry_run_prints_the_golden_script(
    golden: str, options: list[str], config: Path, script: Callable[..., str]
) -> None:
    assert script("submit", str(config), *options) == (GOLDEN / golden).read_text()


def test_site_reaches_the_script_quoted(config: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("qos: high\nconstraint: a100|h100\nmemory_gb: 1.5\nenv: {A: 'two words; $HOME', B: 3}\n")
    lines = script("submit", str(config), "--gpus-per-node", "1", "--site", str(site)).splitlines()
    for line in (
        "#SBATCH --qos=high",
        "#SBATCH --constraint='a100|h100'",
        "#SBATCH --mem=1536M",
        "export A='two words; $HOME'",
        "export B=3",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partitoin: gpu", "'partition'"),
        ("time_minutes: soon", "time_minutes='soon'"),
        ("time_minutes: 1", "signal_delay_s=120 leaves no time"),
        ("env: {A: [1]}", "env.A=[1]"),
        ("- a", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_p12_site_file_mistakes_are_one_sentence(
    text: str, expected: str, config: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(text)
    assert expected in refused("submit", str(config), "--gpus-per-node", "1", "--dry-run", "--site", str(site))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus-per-node", "1"], "no sbatch"),
        ([], "--gpus-per-node G"),
        (["--nodes", "0", "--gpus-per-node", "1"], "--nodes 0"),
        (["--gpus-per-node", "2", "--tasks-per-node", "3"], "differs"),
        (["--gpus-per-node", "3", "--dry-run"], "make it 48 or 72, or take 1 or 2 or 4 or 8 tasks"),
        (["--gpus-per-node", "1", "--dry-run", "train.sed=1"], "train.seed"),
        (["--gpus-per-node", "1", "--dry-run", "--site", "missing.yaml"], "missing.yaml"),
        (["--tasks-per-node", "1", "--executor", "local", "--nodes", "2"], "--nodes 1"),
        (["--tasks-per-node", "1", "--executor", "local", "--dry-run"], "--dry-run"),
        (["--tasks-per-node", "1", "--partition", "gpu"], "--partition"),
        (["--gpus-per-node", "many"], "many"),
    ],
)
def test_p12_submit_mistakes_are_one_sentence(
    options: list[str],
    expected: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # No Slurm, also where one is installed.
    assert expected in refused("submit", str(config), "--folder", str(tmp_path / "jobs"), *options)
    assert not (tmp_path / "jobs").exists()


def test_example_site_file_is_valid() -> None:
    assert load_site(EXAMPLE).partition == "gpu"


def test_the_configuration_travels_with_the_job(config: Path) -> None:
    """Editing the file while the job waits, or between a preemption and its requeue, changes nothing."""
    task = Task(work=TrainWork(config=load_config(config, ["train.seed=7"])))
    data = cloudpickle.dumps(task)
    config.unlink()
    assert pickle.loads(data) == task  # noqa: S301 - written three lines above


def test_local_tasks_all_reduce_over_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that submits has trained before: its own ranks' place is taken."""

    def work(stop_requested: Any) -> bool:
        import os

        import torch
        from torch import distributed

        distributed.init_process_group("gloo")
        total = torch.tensor([float(os.environ["RANK"]) + 1])
        distributed.all_reduce(total)
        print(f"sum {total.item()} of {os.environ['WORLD_SIZE']} {os.environ['LETTER']}", flush=True)
        distributed.destroy_process_group()
        return True

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        job = start(work, tmp_path, Site(time_minutes=5, env={"LETTER": "x"}))
        assert wait_local(job) is None
    assert "LETTER" not in os.environ and os.environ["MASTER_PORT"] == port
    for rank in range(2):
        assert "sum 3.0 of 2 x" in job.task(rank).stdout()


def test_p12_a_mistake_found_on_the_nodes_is_one_sentence(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tasks-per-node", "1", "--executor", "local", "--folder", str(tmp_path / "jobs")]
    assert main(["submit", str(config), *options, f"data.path={tmp_path}/nowhere", f"output={tmp_path}/out"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/nowhere does not exist" in error
    assert len(error.splitlines()) == 1
    (log,) = (tmp_path / "jobs").glob("*/*_log.err")
    assert "Traceback" not in log.read_text()


def test_p7_a_signal_to_one_rank_stops_all_and_requeues(tmp_path: Path) -> None:
    """SIGUSR2 reaches rank 1 only; both ranks agree at a step boundary, and the job starts again and finishes."""
    job = start(stoppable_work(tmp_path), tmp_path, Site(time_minutes=5))
    os.kill(wait_for_pid(tmp_path / "pid-1"), signal.SIGUSR2)
    assert wait_local(job) is None
    assert (tmp_path / "starts-0").read_text() == (tmp_path / "starts-1").read_text() == "xx"
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text() != ""


def test_p7_sigterm_stops_together_and_does_not_requeue(tmp_path: Path) -> None:
    """After `scancel` the state is saved, but the job must stay cancelled."""
    job = start(stoppable_work(tmp_path), tmp_path, Site(time_minutes=5))
    pids = [wait_for_pid(tmp_path / f"pid-{rank}") for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert wait_local(job) is not None
    assert (tmp_path / "starts-0").read_text() == (tmp_path / "starts-1").read_text() == "x"
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text() != ""
    assert "does not requeue" in job.task(0).stdout()
    assert not job.task(0).paths.result_pickle.exists()


@pytest.mark.parametrize("answers", [True, False])
def test_p7_a_controller_that_is_busy_is_asked_again(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of Slurm's own scontrol one that fails twice, or always, as with a controller that changes over."""
    stub = tmp_path / "scontrol"
    stub.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'if [ $(wc -l < {tmp_path}/asked) -gt {2 if answers else 99} ]; then echo "JobState=RUNNING"; exit; fi\n'
        'echo "Socket timed out on send/recv operation" >&2; exit 1\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(task, "RETRY_SECONDS", 0.01)
    if answers:
        assert task.scontrol("show", "job", "7") == "JobState=RUNNING\n"
        assert (tmp_path / "asked").read_text() == 3 * "show job 7\n"
        assert capsys.readouterr().out.count("scontrol show job 7 failed (Socket timed out") == 2
    else:
        monkeypatch.setattr(task, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(SystemExit, match=r"Socket timed out.*submit it again if it is not in the queue"):
            task.scontrol("requeue", "7")


def test_p7_a_task_of_an_array_asks_about_itself_and_requeues_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm gives the last task of an array the array's number as its SLURM_JOB_ID; a stub in place of scontrol."""
    stub = tmp_path / "scontrol"
    stub.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        '[ "$3" = 47_3 ] || echo "JobState=RUNNING PreemptTime=None"\n'  # of the other tasks
        'echo "JobState=RUNNING PreemptTime=2026-11-27T10:00:00"\n'
        '[ "$3" = 47_3 ] || echo "JobState=COMPLETED PreemptTime=None"\n'
    )
    stub.chmod(0o755)
    told = {"SLURM_JOB_ID": "47", "SLURM_ARRAY_JOB_ID": "47", "SLURM_ARRAY_TASK_ID": "3", "SUBMITIT_EXECUTOR": "slurm"}
    for name, value in {**told, "SUBMITIT_FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert task._preempted()
    task._ask_the_script(SlurmJobEnvironment(), 1)
    begin, end = _requeue_lines(tmp_path, None)
    script = "\n".join([*begin, "(exit 5)", *end])
    for _ in range(2):  # the second time there is no such wish
        assert subprocess.run(["bash", "-c", script]).returncode == 5
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name)
    task._ask_the_script(SlurmJobEnvironment(), 1)
    assert subprocess.run(["bash", "-c", script]).returncode == 5
    assert (tmp_path / "asked").read_text() == "show job 47_3\nrequeue 47_3\nrequeue 47\n"


def test_p7_a_job_whose_rank_died_requeues_itself_where_it_got_further(tmp_path: Path) -> None:
    """A stub in place of scontrol; the tasks are a line of shell."""
    stub, latest = tmp_path / "scontrol", tmp_path / "latest"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    stub.chmod(0o755)
    environment = {"SLURM_JOB_ID": "47", "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def asked(tasks: str) -> bool:
        (tmp_path / "asked").unlink(missing_ok=True)
        begin, end = _requeue_lines(tmp_path, latest)
        script = "\n".join([*begin, tasks, *end])
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        requeued = (tmp_path / "asked").exists()
        assert requeued == ("a rank ended with status 9, the training goes on from step-2" in done.stdout)
        assert done.returncode in (0, 9) and done.stderr == ""
        return requeued

    assert not asked("(exit 9)")
    assert not asked(f"echo step-1 > {latest}; (exit 0)")
    assert asked(f"echo step-2 > {latest}; (exit 9)")
    assert not asked("(exit 9)")  # at the same place again
    assert not asked(f"echo step-3 > {latest}; touch {tmp_path}/settled-47; (exit 9)")
    assert not asked("(exit 9)")


def test_p12_gpus_that_the_environment_passes_over_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, none = (
        Placement.from_options(nodes=1, gpus_per_node=g, tasks_per_node=t) for g, t in ((8, None), (None, 2))
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_accelerator(none, Site())
    check_accelerator(eight, Site(env={"DS_ACCELERATOR": "cuda"}))
    with pytest.raises(UserError, match=r"^DS_ACCELERATOR=cpu is set, with which no rank trains on the GPUs"):
        check_accelerator(eight, Site())


def test_a_task_that_sees_its_gpu_alone_takes_it_and_meets_where_the_site_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Slurm tells the second of two tasks on a node; the one GPU is made up."""
    told = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    told |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2"}
    for name, value in {**told, "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # for its end
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert task.export_place() == 1
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"]) == ("1", "0", "localhost")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    task.export_place()
    assert (os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"]) == ("1", "127.0.0.7")
    monkeypatch.setenv("MASTER_ADDR", "node.invalid")
    with pytest.raises(UserError, match=r"does not know node\.invalid, where the ranks are to meet"):
        task.export_place()


def test_p12_gpus_of_this_machine_are_those_that_the_user_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is asked for anything: the numbers alone count."""
    two, none = (Placement.from_options(nodes=1, gpus_per_node=g, tasks_per_node=t) for g, t in ((2, None), (None, 2)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_gpus(2, placement=two, site=Site()) == [[0, 1], [2, 3]]
    assert local_gpus(2, placement=none, site=Site()) == [[], []]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert local_gpus(1, placement=two, site=Site()) == [[3, 5]]
    assert local_gpus(1, placement=two, site=Site(env={"CUDA_VISIBLE_DEVICES": "7,1,2"})) == [[7, 1]]
    with pytest.raises(UserError, match=r"^2 tasks of 2 GPUs at once are not possible, CUDA_V.*=3,5 allows 2: ask"):
        local_gpus(2, placement=two, site=Site())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-1234")
    with pytest.raises(UserError, match="has other names than numbers"):
        local_gpus(1, placement=two, site=Site())


def start(work: Any, folder: Path, site: Site) -> Any:
    placement = Placement.from_options(nodes=1, gpus_per_node=None, tasks_per_node=2)
    return submit_local(Task(work=work), placement=placement, site=site, folder=folder / "jobs")


def stoppable_work(folder: Path) -> Any:
    def work(stop_requested: Any) -> bool:
        """A loop as in training: the first start runs until all ranks agree to stop, the second one finishes."""
        import os
        import time

        import torch
        from torch import distributed

        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        with (folder / f"starts-{rank}").open("a") as starts:
            starts.write("x")
        if (folder / "saved").exists():
            return True
        pid = folder / f"pid-{rank}.part"
        pid.write_text(str(os.getpid()))
        for step in range(3000):
            stop = torch.tensor([float(stop_requested())])
            distributed.all_reduce(stop)
            if step == 0:
                pid.rename(folder / f"pid-{rank}")
            if stop.item():
                (folder / f"stopped-{rank}").write_text(f"step {step}")
                distributed.barrier()
                (folder / "saved").touch()
                distributed.destroy_process_group()
                return False
            time.sleep(0.01)
        raise RuntimeError("no signal came")

    return work


def wait_for_pid(path: Path) -> int:
    wait(f"start of {path.name}", path.exists, 60)
    return int(path.read_text())


def test_gpus_that_slurm_gave_and_pytorch_cannot_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is Slurm's; there is no GPU here, as there is none for a PyTorch that is too new for its driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    check_gpus()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match=r"^Slurm gave this job GPUs \(8\), but torch .* cannot use them"):
        check_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_gpus()


def test_doctor_reports_every_part(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a-000000.tar").write_bytes(bytes(1 << 20))
    assert main(["doctor", "--processes", "2", "--storage", str(tmp_path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    text = "\n".join(lines)
    for part in ("torch ", "deepspeed ", "DALI ", "webdataset ", "mlflow ", "cuDNN ", "precision ", "all-reduce, 2 x "):
        assert part in text
    cpu = next(line for line in lines if "DALI codecs, CPU" in line)
    assert "vp9" in cpu.split("refuses")[0]
    assert "read 1 MB" in text
    assert "64 MiB" in text


def test_doctor_fails_on_a_package_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    row = next(row for row in diagnose(processes=1, storage=None) if row.name == "webdataset")
    assert row.state == "FAIL"
    assert "does not import" in row.text


@pytest.mark.parametrize("options", [["--storage", "missing"], ["--processes", "0"], ["extra=1"]])
def test_p12_doctor_mistakes_are_one_sentence(options: list[str], refused: Callable[..., str]) -> None:
    assert options[0] in refused("doctor", *options)
