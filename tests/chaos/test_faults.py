"""Trainings whose processes, disks, shards or servers fail. The long forms run under `make chaos`."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer
from tiny import small_disk, spoil
from training import Training, checkpoints, history

from dataloaders.shards import DataSet
from rev2net.cli import main
from rev2net.losses import TERMS

Record = Callable[[str, str, str], None]
STEPS = ("train.duration=8steps", "train.checkpoint_every=3steps")


@pytest.mark.chaos
def test_p10_a_stopped_rank_is_named_with_its_process_state_and_the_job_ends(
    training: Callable[..., Training], record: Record
) -> None:
    run = training("train.duration=1000steps", "train.hang_minutes=0.1").launch()
    run.wait_for_step(4)
    begin = time.monotonic()
    os.kill(run.pids[1], signal.SIGSTOP)
    run.wait_for("no rank has made progress for 6 s")
    named = time.monotonic() - begin
    (status,) = run.end(120)
    took = time.monotonic() - begin
    assert status != 0
    assert "rank 1 (process " in run.said() and "does not run: its state is T (stopped)" in run.said()
    before = run.steps_done()[-1]
    run.start()
    run.wait_for(r"step \d+/")
    record(
        "SIGSTOP of one rank (train.hang_minutes=0.1)",
        f"named after {named:.0f} s with its process state, the job ends with status {status} after {took:.0f} s",
        f"{before - run.resumed_from()} steps (of an interval of 3)",
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MB."""
    with small_disk(tmp_path / "disk", "100m") as folder:
        yield folder


@pytest.mark.chaos
def test_p6_a_full_disk_ends_the_run_on_all_ranks_and_leaves_the_checkpoint_before(
    disk: Path, training: Callable[..., Training], undisturbed: Callable[..., Training], record: Record
) -> None:
    run = training(*STEPS, name="disk/run").start()
    run.wait_for("saved .*step-00000003")
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = shutil.disk_usage(disk).free
        file.write(bytes(free - 2_000_000))
    statuses = run.end()
    assert statuses == [1, 1]
    said = run.said()
    assert "step-00000006 could not be written" in said and "the previous one is untouched" in said
    assert "Traceback" not in said
    ballast.unlink()
    assert checkpoints(run) == ["step-00000003"]
    run.start().finish()
    assert run.resumed_from() == 3 and run.equals(undisturbed(*STEPS))
    record(
        "the disk is full while a checkpoint is written",
        "the run ends on all ranks with one sentence and status 1; with room again it goes on from the one before",
        f"{run.lost()} steps (of an interval of 3)",
    )


@pytest.mark.chaos
def test_p6_a_truncated_newest_checkpoint_is_put_aside(
    training: Callable[..., Training], undisturbed: Callable[..., Training], record: Record
) -> None:
    run = training(*STEPS).start()
    run.wait_for("saved .*step-00000006")
    run.kill()
    file = run.output / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    run.start().finish()
    assert "step-00000006 is damaged (optimizer.safetensors has" in run.said() and run.resumed_from() == 3
    assert run.equals(undisturbed(*STEPS))
    record(
        "the newest checkpoint is truncated",
        "it is named, put aside, and the run goes on from the one before",
        f"{run.lost()} steps (an interval of 3 and what was done since)",
    )


@pytest.fixture(scope="session")
def many_shards(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips of `tiny_data`, about one in a shard."""
    data = tmp_path_factory.mktemp("shards") / "data"
    words = ["--codec", "vp9", "--short-side", "128", "--shard-mb", "0.02"]
    assert main(["prepare", "folder", str(tiny_data.parent / "clips"), str(data), *words]) == 0
    return data


@pytest.mark.chaos
def test_p8_a_shard_that_vanishes_ends_the_run_with_its_name(
    many_shards: Path, training: Callable[..., Training], tmp_path: Path, record: Record
) -> None:
    data = tmp_path / "data"
    shutil.copytree(many_shards, data)
    # Little is read ahead, so that some shards are not open yet when the first step is done.
    words = (*STEPS, "train.micro_batch=2", "loader.prefetch=1", "loader.backend=pyav")
    run = training(*words, data=data, ranks=1).start()
    run.wait_for_step(1)
    open_now = {os.path.realpath(f"/proc/{run.pids[0]}/fd/{n}") for n in os.listdir(f"/proc/{run.pids[0]}/fd")}
    gone = [shard.path for shard in DataSet.open(data).shards("train") if os.path.realpath(shard.path) not in open_now]
    assert gone, "all shards are open already"
    for path in gone:
        path.rename(path.with_suffix(".gone"))
    assert run.end() == [2]
    assert "is missing; run `rev2net verify" in run.said() and "Traceback" not in run.said()
    for path in gone:
        path.with_suffix(".gone").rename(path)
    run.start().finish()
    whole = training(*words, data=data, ranks=1, name="whole").start().finish()
    assert run.equals(whole)
    record(
        "a shard vanishes in the middle of an epoch",
        "the run ends with one sentence that names it; with the shard back the same command goes on",
        f"{run.lost()} steps (of an interval of 3)",
    )


@pytest.mark.chaos
@pytest.mark.parametrize("bad", [3, 8])
def test_p8_bad_clips_are_replaced_and_too_many_end_the_run(
    bad: int, tiny_data: Path, training: Callable[..., Training], tmp_path: Path, record: Record
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    spoil(data, bad)
    run = training(*STEPS, "loader.max_bad=0.3", data=data).start()
    statuses = run.end()
    log = run.said(0) + run.said(1)
    assert log.count("cannot be decoded and is replaced") >= bad and "Traceback" not in log
    if bad == 3:
        assert statuses == [0, 0]
        record(f"a shard with {bad} of 16 clips damaged (loader.max_bad=0.3)", "replaced, named and counted", "no step")
    else:
        assert statuses == [1, 1] and "more than loader.max_bad=0.3 allows" in log
        record(
            f"a shard with {bad} of 16 clips damaged (loader.max_bad=0.3)",
            "the run ends on all ranks with one sentence that says how many",
            f"{max(run.steps_done(), default=0)} steps, as there was no checkpoint yet",
        )


@pytest.mark.chaos
@pytest.mark.parametrize("comes_back", [True, False], ids=["for a while", "for ever"])
def test_p11_an_mlflow_server_that_stops_costs_nothing(
    comes_back: bool,
    mlflow_server: MlflowServer,
    training: Callable[..., Training],
    undisturbed: Callable[..., Training],
    record: Record,
) -> None:
    words = ("train.duration=30steps", "train.checkpoint_every=10steps")
    mlflow_server.start()
    run = training(*words, f"tracking.uri={mlflow_server.uri}").start()
    run.wait_for_step(3)
    mlflow_server.stop()
    run.wait_for_step(12)
    if comes_back:
        mlflow_server.start()
    run.finish()
    whole = undisturbed(*words)
    assert run.equals(whole)
    if not comes_back:
        assert "entries for MLflow could not be delivered" in run.said()
        mlflow_server.start()
        run.start().finish()  # nothing to train: what is left is delivered
    client = MlflowClient(mlflow_server.uri)
    (found,) = client.search_runs([client.get_experiment_by_name("rev2net").experiment_id])
    for term in TERMS:
        sent = client.get_metric_history(found.info.run_id, term)
        assert {m.step: m.value for m in sent} == history(whole)[term] and len(sent) == 30
    record(
        f"the MLflow server is killed {'for a while' if comes_back else 'for ever'}",
        "training goes on; " + ("everything arrives once it is back" if comes_back else
                                "everything is kept, and the same command delivers it to a server that is there again"),
        "no step, no metric, none twice",
    )  # fmt: skip
