"""The search for the loss weights: grids, held-out clips, and real sweeps that are killed and shared."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tiny import ROOT, TINY, environment, wait
from tiny_data import make_dataset

from dataloaders.errors import UserError
from dataloaders.loader import EvalLoader, TrainLoader
from dataloaders.plan import ClipShape, Views
from dataloaders.shards import HELD_OUT
from dataloaders.sources import SourceClip, shuffled
from rev2net import tracking
from rev2net.cli import main
from rev2net.config import Config, load_config
from rev2net.data import counts, open_data
from rev2net.grid import FINE, Point, Result, Search, rows, sweep_config, table
from rev2net.sweep import SweepResult, _Folder, sweep
from rev2net.tracking import Tracker
from rev2net.train import train

DEMO = str(ROOT / "configs" / "demo.yaml")
CLIPS = {"data": "of whatever the sweep learns from"}


def search(**changes: object) -> Search:
    return Search(**{"weights": ("alpha", "beta"), "start": (0.01, 0.1), **changes})  # type: ignore[arg-type]


def follow(found: Search, quality: Callable[[Point], Result]) -> dict[Point, Result]:
    """Do all runs of a search, in the order in which it asks for them."""
    results: dict[Point, Result] = {}
    while left := [p for p in [*found.stages(results)][-1].points if p not in results]:
        results[left[0]] = quality(left[0])
    return results


def test_the_paper_s_numbers_of_runs() -> None:
    config = load_config(DEMO)
    one, full = Search.of(config), Search.of(config, full=True)
    assert one.weights == ("alpha", "beta", "lambda_flow", "lambda_im") and one.start == (0.01, 0.1, 0.1, 0.1)
    assert one.sizes == (24, 20) and full.sizes == (1296, 625)
    results = follow(one, lambda point: Result(top1=1 - abs(sum(point) - 0.35)))
    stages = [*one.stages(results)]
    assert [len(stage.points) for stage in stages] == [6] * 4 + [5] * 4
    # Of beta, lambda_flow and lambda_im one coarse cell each, and of the fine grids at least 1 x the winner, were done.
    assert len(results) <= 21 + 16
    assert sum(len(stage.points) for stage in full.stages({})) == 1296


def test_one_weight_after_another_coarse_then_fine() -> None:
    """The optimum is found where it is on the grids; a weight whose coarse winner is 0 is refined below the next."""
    results = follow(search(), lambda p: Result(top1=1 - abs(p[0] - 0.075) - p[1]))
    stages = [*search().stages(results)]
    assert [stage.name for stage in stages] == ["coarse alpha", "coarse beta", "fine alpha", "fine beta"]
    assert stages[0].points == tuple((a, 0.1) for a in (0.0, 0.0001, 0.001, 0.1, 1.0, 10.0))
    assert stages[1].points == tuple((0.1, b) for b in (0.0, 0.0001, 0.001, 0.1, 1.0, 10.0))
    assert stages[2].points == tuple((a, 0.0) for a in (0.0, 0.025, 0.05, 0.075, 0.1))
    assert stages[3].points == tuple((0.075, b) for b in (0.0, 0.000025, 0.00005, 0.000075, 0.0001))
    lines = table(rows(search(), results)).splitlines()
    assert len(lines) == 1 + 6 + 6 + 5 + 5
    (marked,) = [line.split() for line in lines if line.endswith(" best")]
    assert marked == ["fine", "alpha", "0.075", "0", "1.0000", "inf", "best"]
    assert sum("as in coarse alpha" in line for line in lines) == 1


def test_the_full_product_is_refined_around_its_winner() -> None:
    found = search(full=True)
    results = follow(found, lambda p: Result(top1=1 - abs(p[0] - 10) / 10 - abs(p[1] - 0.75)))
    coarse, fine = found.stages(results)
    assert len(coarse.points) == 36 == len(set(coarse.points))
    assert fine.points == tuple(product((0.0, 2.5, 5.0, 7.5, 10.0), FINE))
    assert len(results) == 36 + 25 - 4  # 0 and 1 x the winner are on both grids


def test_equal_accuracies_are_told_apart_by_cross_entropy_and_failures_lose() -> None:
    def quality(point: Point) -> Result:
        if point[0] == 10:
            return Result(failure="NaN")
        return Result(top1=0.5, cross_entropy=1 + abs(point[0] - 1) + abs(point[1] - 0.001))

    results = follow(search(), quality)
    found = rows(search(), results)
    assert {(row["alpha"], row["beta"]) for row in found if row["note"].startswith("best")} == {("1", "0.001")}
    assert [row["alpha"] for row in found if "failed: NaN" in row["note"]] == ["10"]
    worst = follow(search(), lambda point: Result(failure="NaN"))
    assert [stage.name for stage in search().stages(worst)] == ["coarse alpha"]


def test_of_equals_the_first_on_the_grid_wins_whoever_ended_first() -> None:
    one = search(weights=("alpha",), start=(0.01,))
    results = {(value,): Result(top1=0.5, cross_entropy=1.0) for value in reversed(one.coarse)}
    assert one.winner(results) == (0.0,)
    assert {row["alpha"] for row in rows(one, results) if row["note"].startswith("best")} == {"0"}


def test_only_weights_that_act_are_searched() -> None:
    def weights(*words: str) -> tuple[str, ...]:
        return Search.of(load_config(DEMO, words)).weights

    assert weights("loss.ddp=low") == ("beta", "lambda_flow", "lambda_im")
    assert weights("loss.ddp=none", "model.frame_decoder=false") == ("lambda_flow",)
    with pytest.raises(UserError, match="no weight to search"):
        weights("model.name=i3d", "loss.ddp=none")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_p2_held_out_clips_are_tested_once_and_never_trained_on(tmp_path: Path, share: float) -> None:
    """Cut in the middle of a shard, on one rank and on several; the others keep their numbers."""
    whole = make_dataset(tmp_path, shard_sizes=(5, 3, 4))
    data = whole.hold_out("train", share)
    held = max(1, round(share * 12))
    assert (data.num_samples("train"), data.num_samples(HELD_OUT), whole.num_samples("train")) == (12 - held, held, 12)
    shape = ClipShape(frames=8, height=32, width=32)
    trained: dict[str, int] = {}
    for world in (1, 2):
        got = []
        for rank in range(world):
            with TrainLoader(
                *(data, "train"),
                **{"shape": shape, "augment": None, "seed": 3, "global_batch": 4, "micro_batch": 2},
                **{"rank": rank, "world_size": world, "backend": "pyav"},
            ) as loader:
                batches = [next(loader) for _ in range(9 * 2 // world)]
                got += [pair for batch in batches for pair in zip(batch.keys, batch.sample.tolist(), strict=True)]
        trained = dict(got)
        assert trained == {f"clip{i:03d}": i for i in range(12 - held)}
    for world in (1, 2, 3):
        tested: Counter[str] = Counter()
        for rank in range(world):
            with EvalLoader(
                *(data, HELD_OUT),
                **{"shape": shape, "views": Views.parse("1x1"), "rank": rank, "world_size": world, "backend": "pyav"},
            ) as videos:
                tested.update(key for batch in videos for key in batch.keys)
        assert tested == dict.fromkeys((f"clip{i:03d}" for i in range(12 - held, 12)), 1)


@pytest.mark.parametrize(("classes", "clips", "share"), [(8, 24, 0.1), (101, 94, 0.1), (51, 70, 0.05)])
def test_the_last_clips_hold_each_class_as_often_as_the_rest(classes: int, clips: int, share: float) -> None:
    """In the order in which preparation writes them: the demo's data, UCF101, HMDB51."""
    labels = [label for label in range(classes) for _ in range(clips)]
    listed = [
        SourceClip(path=Path("x"), relative=str(i), split="train", label=label, class_name=str(label))
        for i, label in enumerate(labels)
    ]
    last = shuffled(listed, 0)[-round(share * len(listed)) :]
    counts = Counter(clip.label for clip in last)
    assert {abs(counts[label] - share * clips) <= 1 for label in range(classes)} == {True}


def test_a_sweep_without_its_data_keeps_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    words = ["sweep", "configs/demo.yaml", f"output={tmp_path}/sweep", "data.path=nowhere"]
    assert "nowhere" in refused(*words)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_a_cell_of_the_paper_s_tables_fills_no_cell() -> None:
    config = load_config(ROOT / "configs" / "ucf101-imagenet" / "rev2net.yaml")
    swept = sweep_config(config)
    assert (config.tracking.cell, swept.tracking.cell) == ("ucf101-imagenet/rev2net", None)
    assert (swept.data.holdout, swept.output) == (0.1, f"{config.output}-sweep")


def test_p12_nothing_left_to_train_on_is_one_sentence(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, shard_sizes=(1,))
    with pytest.raises(UserError, match=r"data\.holdout=0\.1 of the 1 samples .* leaves none"):
        data.hold_out("train", 0.1)


def test_data_without_a_validation_split_can_be_held_out_from_and_counted(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, shard_sizes=(4,))
    config = load_config(DEMO, ["model.name=i3d", "loss.ddp=none", f"data.path={tmp_path}", "data.holdout=0.25"])
    told = counts(open_data(config), config.data.train_split, config.data.val_split)
    assert told == {"fingerprint": data.fingerprint(), "classes": "3", "train.videos": "3"}


def test_the_dry_run_names_the_grids_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", DEMO, "--dry-run", f"output={tmp_path}/run"]) == 0
    said = capsys.readouterr().out
    assert "24 runs: 0, 0.0001, 0.001, 0.1, 1, 10" in said and "20 runs: 0, 0.25, 0.5, 0.75, 1 of each" in said
    assert "10% of split train, held out" in said and "loss.alpha=0.01" in said
    assert main(["sweep", "--full", DEMO, "data.holdout=0.2", "--dry-run"]) == 0
    assert "1921 runs" in (said := capsys.readouterr().out) and "20% of" in said
    assert not list(tmp_path.iterdir())


# Real sweeps, of the four combinations of two values of two weights, on the tiny clips.


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny clips without their validation shards: whoever opens those, fails."""
    folder = tmp_path_factory.mktemp("held") / "data"
    shutil.copytree(tiny_data, folder, ignore=shutil.ignore_patterns("val-*"))
    return folder


def words(data: Path, output: Path) -> list[str]:
    keys = ["loss.ddp=none", "loss.ddp_low_from=0", "train.duration=4steps", "train.checkpoint_every=1steps"]
    keys += ["data.holdout=0.25", f"target.path={data}", "target.adapt=false"]
    return [*TINY, f"data.path={data}", f"output={output}", *keys]


def configuration(data: Path, output: Path) -> tuple[Config, Search]:
    config = load_config(DEMO, words(data, output))
    found = Search.of(config)
    grids = Search(weights=found.weights, start=found.start, coarse=(0.0, 0.1), fine=(1.0,), full=True)
    return sweep_config(config), grids


WORKER = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from rev2net import sweep
from test_sweep import configuration
sweep.POLL_SECONDS = 0.2
print(sweep.sweep(*configuration(Path(sys.argv[1]), Path(sys.argv[2]))).table)
"""


def worker(data: Path, output: Path) -> subprocess.Popen[str]:
    env = {**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", WORKER, str(data), str(output)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    """A sweep that nothing happens to: its folder and its end."""
    folder = tmp_path_factory.mktemp("whole")
    ended = sweep(*configuration(data, folder / "run"))
    assert ended is not None
    return folder / "run-sweep", ended


BEGUN = "4 steps of 8 clips"
"""What a training says when it starts or goes on."""


def starts(folder: Path) -> dict[str, int]:
    """How often each run of a sweep was started."""
    return {log.parent.name: log.read_text().count(BEGUN) for log in folder.glob("*/train.log")}


def family(store: Path) -> tuple[Run, list[Run]]:
    """The run of the only sweep in a store, and its children."""
    client = MlflowClient(f"sqlite:///{store}")
    found = client.search_runs([client.get_experiment_by_name("rev2net").experiment_id])
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    return parent, children


def test_winner_and_whole_grid_are_in_mlflow(undisturbed: tuple[Path, SweepResult]) -> None:
    folder, ended = undisturbed
    assert starts(folder) == {f"lambda_flow{f}-lambda_im{i}": 1 for f in ("0", "0.1") for i in ("0", "0.1")}
    parent, children = family(folder.parent / "mlflow.db")
    assert {run.info.run_name for run in children} == starts(folder).keys()
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    values = {
        f"loss.lambda_flow={run.data.params['loss.lambda_flow']} loss.lambda_im={run.data.params['loss.lambda_im']}": (
            run.data.metrics["val/top1"],
            -run.data.metrics["val/cross_entropy"],
        )
        for run in children
    }
    winner = max(values, key=lambda name: values[name]).replace("0.0", "0")
    assert " ".join(ended.winner) == parent.data.tags["sweep.winner"] == winner
    assert len({entropy for _, entropy in values.values()}) == 4, "the weights made no difference"
    assert (parent.data.metrics["best/top1"], -parent.data.metrics["best/cross_entropy"]) == max(values.values())
    assert (parent.data.tags["sweep.state"], parent.data.tags["sweep.coarse"]) == ("finished", "0, 0.1")
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    assert {"grid.csv", "grid.png"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    grid = Path(client.download_artifacts(parent.info.run_id, "grid.csv")).read_text().splitlines()
    assert len(grid) == 1 + 4 + 1
    winner = [word.split("=")[1] for word in ended.winner]
    marked = [line for line in grid if line.split(",")[1:3] == winner]  # in both grids, unless a weight of it is 0
    assert marked and marked == [line for line in grid if "best" in line]
    assert not [*folder.glob("*/checkpoints")]


def test_killed_in_a_training_and_gone_on_with_by_two_at_once(
    data: Path, tmp_path: Path, undisturbed: tuple[Path, SweepResult]
) -> None:
    """SIGKILL in the second of four runs: that one goes on from its checkpoint, no finished run is done again."""
    first = worker(data, tmp_path / "run")
    folder = tmp_path / "run-sweep"
    wait("a checkpoint of the second run", (folder / "lambda_flow0-lambda_im0.1/checkpoints/latest").exists)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = starts(folder)
    assert before == {"lambda_flow0-lambda_im0": 1, "lambda_flow0-lambda_im0.1": 1}
    with (folder / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "torn')
    two = [worker(data, tmp_path / "run") for _ in range(2)]
    said = [each.communicate(timeout=200)[0] for each in two]
    assert [each.returncode for each in two] == [0, 0], said
    assert starts(folder) == starts(undisturbed[0]) | {"lambda_flow0-lambda_im0.1": 2}
    assert "going on from" in (folder / "lambda_flow0-lambda_im0.1/train.log").read_text()
    assert all(text.count(BEGUN) >= 1 for text in said) and sum(text.count(BEGUN) for text in said) == 3
    assert all(text.endswith(undisturbed[1].table + "\n") for text in said)
    whole, killed = (json.loads((f / "result.json").read_text()) for f in (undisturbed[0], folder))
    assert whole["winner"] == killed["winner"] and whole["result"] == killed["result"]
    _, children = family(tmp_path / "mlflow.db")
    assert Counter(run.info.run_name for run in children) == dict.fromkeys(starts(folder), 1)


def test_a_finished_sweep_prints_its_table_again_and_other_settings_are_refused(
    data: Path,
    undisturbed: tuple[Path, SweepResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    folder, ended = undisturbed
    output = folder.with_name("run")
    held = tmp_path / "held.yaml"  # a share that stands in the file is not one of the winner's training either
    held.write_text(f"base: {DEMO}\ndata: {{holdout: 0.25}}\n")
    same = ["sweep", str(held), *(word for word in words(data, output) if not word.startswith("data.holdout"))]
    before = starts(folder)
    _, grids = configuration(data, output)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "of", lambda *_, **__: grids)
        assert main(same) == 0
    said = capsys.readouterr().out
    assert ended.table in said and starts(folder) == before
    command = re.search(r"^train it +rev2net train (.*)$", said, re.MULTILINE)
    assert command is not None
    chosen = load_config(held, command[1].split()[1:])
    assert [
        f"loss.lambda_flow={chosen.loss.lambda_flow:g}",
        f"loss.lambda_im={chosen.loss.lambda_im:g}",
    ] == ended.winner
    assert (chosen.output, chosen.data.holdout) == (f"{output}-winner", 0.0)  # in `output` there may be another run
    assert "holds a sweep with train.seed=0, not train.seed=1" in refused(*same, "train.seed=1")
    for without_effect in ([], ["loader.workers=3", "train.log_every=7"]):
        assert "holds a sweep with the full product, not one weight at a time" in refused(*same, *without_effect)
    assert starts(folder) == before


def test_a_mistake_before_the_first_run_can_be_mended(data: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    words_of_it = ["sweep", DEMO, *words(data, f"{tmp_path}/run/"), "init_from=nowhere"]  # with a shell's slash
    assert "there is no checkpoint at nowhere" in refused(*words_of_it)
    config, search = configuration(data, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "mlartifacts"] == ["run-sweep"]
    asked = iter([False, True])
    assert sweep(config, search, stop_requested=lambda: next(asked)) is None
    assert load_config(tmp_path / "run-sweep" / "config.yaml").init_from is None


def untracked(folder: Path) -> tuple[Config, Search]:
    config, grids = configuration(folder, folder / "run")
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})}), grids


def test_another_sweep_gets_a_folder_only_while_nobody_works_in_it(tmp_path: Path) -> None:
    config, grids = untracked(tmp_path)
    others = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    late = _Folder(config, grids, CLIPS)
    first = _Folder(others, grids, CLIPS)  # nothing is claimed yet
    with ExitStack() as held:
        assert first.claim(held)[0]  # and no training has written anything so far
        for refused in (lambda: late.claim(held), lambda: _Folder(config, grids, CLIPS)):
            with pytest.raises(UserError, match=r"holds a sweep with train.seed=1, not train.seed=0: give"):
                refused()
    with ExitStack() as held:
        folder = _Folder(config, grids, CLIPS)
        assert folder.claim(held)[0]
        folder.add(Result(top1=0.5, cross_entropy=1.0))
    for run in (tmp_path / "run-sweep").glob("lambda*"):
        shutil.rmtree(run)  # the results are still those of its settings and of its clips
    with pytest.raises(UserError, match=r"holds a sweep with train.seed=0, not train.seed=1: give"):
        _Folder(others, grids, CLIPS)
    with pytest.raises(UserError, match=rf"holds a sweep on other clips than {config.data.path} holds now: set data"):
        _Folder(config, grids, {"data": "of others"})


def test_runs_go_below_another_run_once_somebody_has_deleted_the_sweep_s(data: Path, tmp_path: Path) -> None:
    config, grids = configuration(data, tmp_path / "run")
    folder = _Folder(config, grids, CLIPS)
    deleted = folder._parent
    MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").delete_run(deleted)
    for _ in range(2):
        with ExitStack() as held:
            _, run = folder.claim(held)
            folder.add(Result(top1=0.5, cross_entropy=1.0))
    assert run is not None and run.tracking.parent not in (None, deleted)
    assert run.tracking.parent == family(tmp_path / "mlflow.db")[0].info.run_id


def test_p11_results_do_not_wait_for_a_server_that_is_away(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub in place of the connection: it would be waited for until this test is ended from outside."""
    config, grids = configuration(data, tmp_path / "run")
    known = _Folder(config, grids, CLIPS)._parent

    def away(_: Tracker) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(Tracker, "_connect", away)
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 1e6)
    monkeypatch.setattr(tracking, "HURRY_SECONDS", 0.1)
    folder = _Folder(config, grids, CLIPS)
    assert folder._parent == known is not None
    with ExitStack() as held:
        assert folder.claim(held)[0]
        folder.add(Result(top1=0.5, cross_entropy=1.0))
    monkeypatch.undo()
    _Folder(config, grids, CLIPS)
    parent, _ = family(tmp_path / "mlflow.db")
    assert parent.data.metrics["best/top1"] == 0.5


def test_a_line_torn_by_another_process_spoils_no_result_and_its_lock_holds_nobody_up(tmp_path: Path) -> None:
    config, grids = untracked(tmp_path)
    folder = _Folder(config, grids, CLIPS)
    left = tmp_path / "run-sweep" / "journal.log.lock"
    for top1 in (0.2, 0.3):
        with ExitStack() as held, (tmp_path / "run-sweep" / "journal.log").open("a") as journal:
            assert folder.claim(held)[0]
            journal.write('{"op_code": 4, "torn')  # another process's last words on a full disk
            journal.flush()
            left.symlink_to("runs/run-sweep/journal.log")  # as a kill leaves it; the path is relative to elsewhere
            folder.add(Result(top1=top1, cross_entropy=1.0))
    left.symlink_to("runs/run-sweep/journal.log")
    for known in (folder, _Folder(config, grids, CLIPS)):
        assert [result.top1 for result in known._results().values()] == [0.2, 0.3]


def test_a_loss_that_is_not_finite_is_a_failed_cell_and_a_stop_is_gone_on_from(data: Path, tmp_path: Path) -> None:
    alone = ["model.flow_decoder=false", "data.holdout=0.1"]
    config = sweep_config(load_config(DEMO, [*words(data, tmp_path / "run"), *alone]))
    found = Search(weights=("lambda_im",), start=(0.1,), coarse=(1e38, 0.1), fine=(1.0,))
    asked = iter([False] * 7 + [True])
    assert sweep(config, found, stop_requested=lambda: next(asked)) is None
    ended = sweep(config, found)
    assert ended is not None and ended.winner == ["loss.lambda_im=0.1"] and "failed: 3 steps in a row" in ended.table
    assert starts(tmp_path / "run-sweep") == {"lambda_im1e+38": 1, "lambda_im0.1": 2}
    _, children = family(tmp_path / "mlflow.db")
    assert {run.info.run_name: run.info.status for run in children} == {
        "lambda_im1e+38": "FAILED",
        "lambda_im0.1": "FINISHED",
    }


def test_a_run_does_not_go_on_as_another_run(data: Path, tmp_path: Path) -> None:
    asked = iter([False, True])
    config = load_config(DEMO, words(data, tmp_path / "run"))
    train(config, stop_requested=lambda: next(asked))
    for key, before, now in (("data.holdout", 0.25, 0.5), ("data.split", 1, 2), ("train.seed", 0, 1)):
        with pytest.raises(UserError, match=rf"was trained with {key}={before}, not {now}: choose another output="):
            train(load_config(DEMO, [*words(data, tmp_path / "run"), f"{key}={now}"]))
    short = [*words(data, tmp_path / "run"), "train.duration=2steps"]  # it has come as far
    with pytest.raises(UserError, match=r"is the end of a training with loss.lambda_im=0.1, not 10.0: choose another"):
        train(load_config(DEMO, [*short, "loss.lambda_im=10"]))
    assert train(load_config(DEMO, [*short, "loader.workers=2"])).step == 2
