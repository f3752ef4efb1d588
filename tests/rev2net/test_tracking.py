"""The tracker against real MLflow stores: a server that is away, comes back, changes; kills and resumes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer
from tiny import environment, small_disk, wait

from rev2net import tracking
from rev2net.config import Config, load_config
from rev2net.store import Run
from rev2net.tracking import Tracker, source_commit


def configuration(folder: Path, uri: str | None = None) -> Config:
    words = [f"output={folder}/run", "data.path=nowhere"]
    return load_config("configs/demo.yaml", words if uri is None else [*words, f"tracking.uri={uri}"])


def history(uri: str, name: str = "x") -> list[list[tuple[int, float]]]:
    """Step and value of a metric, for every run of the store."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("rev2net")
    runs = client.search_runs([found.experiment_id]) if found else []
    return [[(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for run in runs]


def test_p11_what_a_server_missed_arrives_once_it_is_back(
    tmp_path: Path,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 4.0)
    config = configuration(tmp_path, mlflow_server.uri)
    begin = time.monotonic()
    with Tracker(config, active=True) as tracker:
        for step in (1, 2, 3):
            tracker.metrics({"x": step / 2}, step)
        called = time.monotonic() - begin
    assert called < 3.0, "logging waited for the server"
    assert caplog.text.count("fails, training goes on") == 1
    assert "6 entries for MLflow could not be delivered" in caplog.text
    mlflow_server.start()
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 60.0)
    # As after a kill behind step 2: step 3 comes again, and is dropped.
    with Tracker(config, active=True, resumed=2) as tracker:
        for step in (3, 4):
            tracker.metrics({"x": step / 2}, step)
    assert history(mlflow_server.uri) == [[(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]]
    client = MlflowClient(mlflow_server.uri)
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    # Nothing is left, and nothing is sent a second time.
    Tracker(config, active=True, resumed=4, complete=True).close()
    assert len(history(mlflow_server.uri)[0]) == 4


def test_p11_a_kill_loses_no_entry_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading; from rev2net import tracking; from rev2net.config import load_config\n"
        "tracking.Tracker._deliver = lambda self: None\n"  # killed before anything was delivered
        "t = tracking.Tracker(load_config('configs/demo.yaml', sys.argv[1:]), active=True)\n"
        "for step in (1, 2): t.metrics({'x': float(step)}, step)\n"
        "os.kill(os.getpid(), 9)"
    )
    words = [f"output={tmp_path}/run", "data.path=nowhere"]
    assert subprocess.run([sys.executable, "-c", code, *words], env=environment()).returncode == -9
    with (tmp_path / "run" / "outbox.jsonl").open("a") as file:
        file.write('{"step": 3, "val')
    with Tracker(configuration(tmp_path), active=True, resumed=1) as tracker:
        tracker.metrics({"x": 3.0}, 3)
    assert history(tracker.uri) == [[(1, 1.0), (2, 2.0), (3, 3.0)]]


def test_trainings_that_begin_at_once_make_one_store(tmp_path: Path) -> None:
    code = (
        "import sys, time; import mlflow.tracking; from pathlib import Path; from rev2net.store import make_client\n"
        "Path(sys.argv[2]).touch()\n"
        "while not Path(sys.argv[3]).exists(): time.sleep(0.01)\n"
        "make_client(sys.argv[1]).create_experiment(Path(sys.argv[2]).name)"
    )
    uri, ready = f"sqlite:///{tmp_path}/mlflow.db", [tmp_path / name for name in "abc"]
    command = [sys.executable, "-c", code, uri]
    workers = [subprocess.Popen([*command, str(file), str(tmp_path / "go")], env=environment()) for file in ready]
    wait("three processes", lambda: all(file.exists() for file in ready))
    (tmp_path / "go").touch()
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert {found.name for found in MlflowClient(uri).search_experiments()} == {"Default", "a", "b", "c"}
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c", "go", "mlflow.db", "mlflow.lock"}


def test_another_store_or_a_run_that_is_gone_gets_the_whole_history(tmp_path: Path) -> None:
    with Tracker(configuration(tmp_path), active=True) as tracker:
        tracker.metrics({"x": 1.0}, 1)
    other = f"sqlite:///{tmp_path}/other.db"
    with Tracker(configuration(tmp_path, other), active=True, resumed=1, run_id=tracker.run_id) as moved:
        moved.metrics({"x": 2.0}, 2)
    assert history(tracker.uri) == [[(1, 1.0)]] and history(other) == [[(1, 1.0), (2, 2.0)]]
    MlflowClient(other).delete_run(moved.run_id)
    with Tracker(configuration(tmp_path, other), active=True, resumed=2, run_id=moved.run_id) as back:
        back.metrics({"x": 3.0}, 3)
    assert history(other) == [[(1, 1.0), (2, 2.0), (3, 3.0)]]


def test_what_a_resume_changes_in_the_configuration_is_a_tag(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    with Tracker(config, active=True, facts={"train.steps": "240"}) as tracker:
        pass
    longer = load_config("configs/demo.yaml", [f"output={tmp_path}/run", "data.path=nowhere", "train.duration=5steps"])
    for _ in range(2):
        with Tracker(longer, active=True, resumed=3, facts={"train.steps": "5"}):
            pass
    Tracker(longer, active=True, resumed=5, complete=True).close()
    assert tracker.run_id is not None
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    changed = {key: value for key, value in run.data.tags.items() if key.startswith("changed.")}
    assert changed == {"changed.train.duration": "5steps", "changed.train.steps": "5"}
    assert run.data.params["train.duration"] == "240steps" and run.data.params["train.steps"] == "240"
    rows = (tmp_path / "run" / "outbox.jsonl").read_text().splitlines()
    assert sum('"changed.' in row for row in rows) == 1


def test_a_setting_that_was_changed_and_changed_back_leaves_its_values(tmp_path: Path) -> None:
    for number, lr in enumerate(("0.1", "0.5", "0.3", "0.1")):
        words = [f"output={tmp_path}/run", "data.path=nowhere", f"optim.lr={lr}", f"loader.prefetch={lr[-1]}"]
        with Tracker(load_config("configs/demo.yaml", words), active=True, resumed=number or None) as tracker:
            pass
    run = Run.of(MlflowClient(tracker.uri).get_run(tracker.run_id))
    assert (run.first["optim.lr"], run.params["optim.lr"], run.earlier) == ("0.1", "0.1", {"optim.lr": ("0.5", "0.3")})


@pytest.mark.parametrize("words", [["optim.lr=0.5"], ["loader.prefetch=3"]], ids=["other results", "the same"])
def test_steps_done_again_after_a_change_are_logged_anew(words: list[str], tmp_path: Path) -> None:
    with Tracker(configuration(tmp_path), active=True) as tracker:
        for step in (10, 20, 30):
            tracker.metrics({"x": step / 10, **({"y": 1.0} if step == 30 else {})}, step)
    changed = load_config("configs/demo.yaml", [f"output={tmp_path}/run", "data.path=nowhere", *words])
    # From the checkpoint at step 10; killed, and on from step 20 with the same configuration.
    for resumed, value in ((10, 7.0), (20, 8.0)):
        with Tracker(changed, active=True, resumed=resumed) as tracker:
            tracker.metrics({"x": value}, resumed + 10)
    with Tracker(changed, active=True, resumed=30) as tracker:
        tracker.metrics({"x": 9.0, "y": 2.0}, 30)
    assert history(tracker.uri, "y")[0][-1] == (30, 2.0 if words == ["optim.lr=0.5"] else 1.0)
    anew = words == ["optim.lr=0.5"]
    redone = [(20, 7.0), (30, 8.0)] if anew else []
    assert sorted(history(tracker.uri)[0]) == sorted([(10, 1.0), (20, 2.0), (30, 3.0), *redone])
    assert [value for _, value in history(tracker.uri, "y")[0]] == ([1.0, 2.0] if anew else [1.0])


def test_another_test_of_the_step_that_a_run_stands_at_is_logged(tmp_path: Path) -> None:
    with Tracker(configuration(tmp_path), active=True) as tracker:
        tracker.metrics({"x": 0.5}, 30)
    views = load_config("configs/demo.yaml", [f"output={tmp_path}/run", "data.path=nowhere", "eval.views=10x3"])
    for value in (0.7, 0.8):  # the second time nothing has changed
        with Tracker(views, active=True, resumed=30) as tracker:
            tracker.metrics({"x": value}, 30)
    assert history(tracker.uri) == [[(30, 0.5), (30, 0.7)]]


def test_p11_a_store_whose_disk_is_full_gets_everything_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers, and takes nothing."""
    caplog.set_level("INFO")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.1)
    with small_disk(tmp_path / "disk", "4m") as disk:
        uri = f"sqlite:///{disk}/mlflow.db"
        tracker = Tracker(configuration(tmp_path, uri), active=True)
        tracker.metrics({"x": 1.0}, 1)
        tracker.flush()
        tries, send = [], tracker._send
        monkeypatch.setattr(tracker, "_send", lambda row: (tries.append(row), send(row)))
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(512))
        for step in (2, 3):
            tracker.metrics({"x": float(step), **{f"y{i}": 0.0 for i in range(90)}}, step)
        wait("more tries than a refused entry has", lambda: len(tries) > tracking.TRIES + 2)
        (disk / "ballast").unlink()
        tracker.flush()
        tracker.close()
        assert history(uri) == [[(1, 1.0), (2, 2.0), (3, 3.0)]]
    assert "refuses" not in caplog.text and "answers again" in caplog.text


def test_a_store_that_has_another_name_now_keeps_its_run(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "home").symlink_to("one")
    with Tracker(configuration(tmp_path / "home"), active=True) as tracker:
        tracker.metrics({"x": 1.0}, 1)
    (tmp_path / "one").rename(tmp_path / "two")
    (tmp_path / "home").unlink()
    (tmp_path / "home").symlink_to("two")
    with Tracker(configuration(tmp_path / "home"), active=True, resumed=1) as again:
        again.metrics({"x": 2.0}, 2)
    assert again.uri != tracker.uri and again.run_id == tracker.run_id
    assert history(again.uri) == [[(1, 1.0), (2, 2.0)]]


def test_a_picture_that_the_disk_does_not_take_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(configuration(tmp_path), active=True) as tracker:
        (tmp_path / "run" / "matrix.json").mkdir()  # what cannot be written
        tracker.json({}, "matrix.json")
        tracker.metrics({"x": 1.0}, 1)
    assert "matrix.json is lost" in caplog.text and history(tracker.uri) == [[(1, 1.0)]]


def test_a_complete_training_is_finished_whatever_was_left_of_it(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    tracker = Tracker(config, active=True)
    tracker.metrics({"x": 1.0}, 1)
    tracker.close()  # killed behind the result, before its status
    client = MlflowClient(tracker.uri)
    assert tracker.run_id is not None and client.get_run(tracker.run_id).info.status == "RUNNING"
    asked = load_config("configs/demo.yaml", [f"output={tmp_path}/run", "data.path=nowhere", "train.precision=fp32"])
    for _ in range(2):
        Tracker(asked, active=True, resumed=1, complete=True).close()
        run = client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED" and not [key for key in run.data.tags if key.startswith("changed.")]
    assert len((tmp_path / "run" / "outbox.jsonl").read_text().splitlines()) == 4


def test_a_new_training_in_the_same_folder_starts_an_empty_run(tmp_path: Path) -> None:
    for _ in range(2):
        with Tracker(configuration(tmp_path), active=True) as tracker:
            tracker.metrics({"x": 1.0}, 1)
    assert history(tracker.uri) == [[(1, 1.0)], [(1, 1.0)]]


def test_a_training_killed_before_its_first_checkpoint_does_not_stay_running(tmp_path: Path) -> None:
    killed = Tracker(configuration(tmp_path), active=True)
    killed.metrics({"x": 1.0}, 1)
    killed.close()  # delivered, and without a status: as a kill leaves it
    with Tracker(configuration(tmp_path), active=True) as again:
        again.metrics({"x": 1.0}, 1)
    client = MlflowClient(again.uri)
    assert [client.get_run(str(run.run_id)).info.status for run in (killed, again)] == ["KILLED", "FINISHED"]
    # One that came to its end keeps its status.
    Tracker(configuration(tmp_path), active=True).close()
    assert client.get_run(str(again.run_id)).info.status == "FINISHED"


def test_a_disk_that_takes_no_entry_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Tracker(configuration(tmp_path), active=True) as tracker:
        tracker.metrics({"x": 1.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(tracking.Outbox, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            tracker.metrics({"x": 2.0}, 2)
        tracker.metrics({"x": 3.0}, 3)
    assert "an entry for MLflow is lost" in caplog.text
    assert history(tracker.uri) == [[(1, 1.0), (3, 3.0)]]


def test_an_entry_that_the_store_refuses_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.1)
    with Tracker(configuration(tmp_path), active=True) as tracker:
        tracker.metrics({"x": 1.0}, 1)
        tracker._put({"file": "a picture that somebody has removed.png"})
        tracker._put({"replaces": 32 * "0"})  # a run that was deleted for good
        tracker.metrics({"a/b?c": 1.0, "x": 2.0}, 2)  # not a name that MLflow takes
        tracker.metrics({"x": 3.0}, 3)
    assert caplog.text.count("refuses an entry, which is dropped") == 3
    assert history(tracker.uri) == [[(1, 1.0), (3, 3.0)]]
    assert tracker.run_id is not None
    run = MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.params["model.name"] == "rev2net"


def test_files_that_their_store_does_not_take_hold_up_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a server keeps files in a folder of its own machine, which clients cannot write to."""
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.1)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/mlartifacts")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_text", denied)
        with Tracker(configuration(tmp_path), active=True) as tracker:
            for step in range(1, 200):
                tracker.metrics({f"x{n}": float(step) for n in range(20)}, step)
            wait("the metrics", lambda: not tracker._outbox.in_order)
            tracker.hurry()
        wait("its last try", lambda: not tracker._thread.is_alive())  # which would succeed once the patch is undone
    assert caplog.text.count("takes no files, they wait for it: ") == 1
    assert re.search(r"[12] entries for MLflow could not be delivered", caplog.text)
    client = MlflowClient(tracker.uri)
    assert tracker.run_id is not None
    assert history(tracker.uri, "x7") == [[(step, float(step)) for step in range(1, 200)]]
    assert client.list_artifacts(tracker.run_id) == []
    Tracker(configuration(tmp_path), active=True, resumed=200, complete=True).close()
    assert [file.path for file in client.list_artifacts(tracker.run_id)] == ["config.yaml"]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert history(tracker.uri, "x7") == [[(step, float(step)) for step in range(1, 200)]]


def test_an_interrupted_run_is_killed_until_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "HURRY_SECONDS", 60.0)

    def status() -> str:
        assert tracker.run_id is not None
        return str(MlflowClient(tracker.uri).get_run(tracker.run_id).info.status)

    with Tracker(configuration(tmp_path), active=True) as tracker:
        tracker.interrupt()
    assert status() == "KILLED"
    with Tracker(configuration(tmp_path), active=True, resumed=1) as tracker:
        tracker.metrics({"x": 1.0}, 1)
        tracker.flush()
        assert status() == "RUNNING"
    assert status() == "FINISHED"


def test_a_damaged_outbox_costs_what_is_damaged(tmp_path: Path) -> None:
    with Tracker(configuration(tmp_path), active=True) as tracker:
        for step in (1, 2, 3):
            tracker.metrics({"x": float(step)}, step)
    file = tmp_path / "run" / "outbox.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[3] = bytes(len(lines[3]))  # step 2
    file.write_bytes(b"\n".join(lines))
    (tmp_path / "run" / "outbox.json").write_text("{")
    with Tracker(configuration(tmp_path), active=True, resumed=1) as again:
        again.metrics({"x": 4.0}, 4)
    assert sorted(history(tracker.uri)) == [[(1, 1.0), (2, 2.0), (3, 3.0)], [(1, 1.0), (3, 3.0), (4, 4.0)]]


def test_the_commit_says_whether_the_code_was_changed_and_a_copy_of_it_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    monkeypatch.delenv("REV2NET_COMMIT", raising=False)
    assert source_commit() is None
    git("init")
    (tmp_path / "tracking.py").write_text("")
    git("add", ".")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    git("tag", "v1")
    assert source_commit() == commit
    (tmp_path / "tracking.py").write_text("changed")
    assert source_commit() == f"{commit}-dirty"
    monkeypatch.setenv("REV2NET_COMMIT", "told")
    assert source_commit() == "told"
