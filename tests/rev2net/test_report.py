"""`rev2net report`: what fills a cell, what does not and why, on real MLflow stores."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer

from rev2net.cli import main
from rev2net.config import load_config
from rev2net.report import CONFIGS, DATA, Cell, Report, read_report
from rev2net.store import CHANGED, DEFAULT, EARLIER, TESTED_STEPS, TESTS, reading
from rev2net.tracking import tracking_uri

NASTY = "<script>document.title='broken'</script> | `x` [a](b) \x1b[31m"
COMMIT = "0123456789abcdef"


class Runs:
    """Writes runs as trainings and tests do, one a second later than the other."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.file}"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("cells", (folder / "mlartifacts").as_uri())
        self._clock = 1_790_000_000_000

    def run(
        self,
        *,
        name: str = "a run",
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        metrics: Sequence[tuple[str, float, int]] = (),
        status: str = "FINISHED",
    ) -> str:
        self._clock += 1000
        made = self.client.create_run(self.experiment, self._clock, dict(tags or {}), name)
        run_id = str(made.info.run_id)
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, self._clock, step) for key, value, step in metrics],
            params=[Param(key, value) for key, value in (params or {}).items()],
        )
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id

    def training(
        self,
        cell: str,
        top1: float = 0.5,
        *,
        seed: int = 0,
        split: int = 1,
        step: int = 100,
        words: Sequence[str] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        name: str = "training",
        status: str = "FINISHED",
    ) -> str:
        """One that was to have 100 steps and was last tested after `step`."""
        config = load_config(CONFIGS / f"{cell}.yaml", [f"train.seed={seed}", f"data.split={split}", *words])
        facts = {"train.steps": "100", "data.val.videos": "97", "data.val.missing": "2", "data.val.quarantined": "1"}
        metric = "target/top1" if "-to-" in cell else "val/top1"
        return self.run(
            name=name,
            tags={"mlflow.source.git.commit": COMMIT, **(tags or {})},
            params={**config.flat(), **facts, **(params or {})},
            metrics=[("loss/ce", 2.0, 10), ("loss/ce", 1.0, step), (metric, 0.1, 10), (metric, top1, step)],
            status=status,
        )

    def test(self, *trainings: str, top1: float = 0.5, views: str = "10x3") -> str:
        """One that --log kept when the trainings had 100 steps."""
        params = {"eval.views": views, "train.precision": "fp32", TESTED_STEPS: " ".join(["100"] * len(trainings))}
        metrics = [("test/top1", top1, 0)]
        return self.run(tags={TESTS: " ".join(trainings)}, params=params, metrics=metrics)

    def confusion(self, run_id: str, name: str, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
        tree = {"classes": classes, "confusion": counts}
        self.client.log_text(run_id, json.dumps(tree), name)

    def report(self) -> Report:
        with reading(self.uri) as store:
            return read_report(store)

    def cell(self, *configs: str) -> Cell:
        return self.report().cells[configs]

    def why_not(self, run_id: str, *configs: str) -> str | None:
        return next(r.why_not for r in self.cell(*configs).results if r.run.id == run_id)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's file as MLflow makes it."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def runs(empty: Path, tmp_path: Path) -> Runs:
    (tmp_path / "store").mkdir()
    shutil.copy(empty, tmp_path / "store" / "mlflow.db")
    return Runs(tmp_path / "store")


def test_every_configuration_says_which_cell_it_is_and_runs_where_the_report_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = [file for file in CONFIGS.glob("*/*.yaml") if file.parent.name not in ("bases", "classes", "cluster")]
    assert len(files) == 54
    for file in files:
        config = load_config(file)
        assert tracking_uri(config) == f"sqlite:///{DEFAULT.resolve()}"
        assert config.tracking.cell == file.relative_to(CONFIGS).with_suffix("").as_posix()
        assert {Path(path).name for path in (config.data.path, config.target.path) if path is not None} <= DATA.keys()


def test_a_store_without_runs_gives_the_paper_s_numbers_and_says_that_there_is_no_run(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--store", f"sqlite:///{empty}"]) == 0
    text = capsys.readouterr().out
    tables = yaml.safe_load((CONFIGS / "tables.yaml").read_text())
    cells = [cell for table in tables.values() for row in table["rows"] for cell in row["cells"]]
    assert f"0 of {len(cells)} cells have a number of ours." in text and "left out: 0." in text
    assert text.count("no run  ") + len(re.findall("no run +-$", text, re.MULTILINE)) >= len(cells)
    row = next(line for line in text.splitlines() if line.startswith("Sun-OFF") and "RGB" in line)
    assert row.split() == ["Sun-OFF", "RGB", "93.3", "no", "run", "-", "-", "no", "run", "-"]
    assert "trained only with the frame decoder" in text


def test_three_seeds_on_three_splits_are_a_mean_of_means_with_the_spread_over_seeds(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = {0: (0.90, 0.91, 0.95), 1: (0.93, 0.90, 0.93), 2: (0.96, 0.94, 0.95)}
    for seed, splits in accuracy.items():
        for split, top1 in enumerate(splits, 1):
            runs.training("ucf101-imagenet/rev2net", top1, seed=seed, split=split)
    cell = runs.cell("ucf101-imagenet/rev2net")
    # Seeds: 0.92, 0.92, 0.95. Deviations from 0.93: -1, -1, 2 percent; sqrt(6 / 2) = 1.732.
    assert cell.value == pytest.approx(0.93) and cell.spread == (pytest.approx(0.0173205, abs=1e-6), "seeds")
    assert (cell.seeds, cell.splits, len(cell.counted), cell.deviates) == (3, 3, 9, False)
    assert main(["report", "--store", runs.uri]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("Rev2Net (ours)"))
    assert re.split("  +", row)[2:5] == ["94.6", "93.0 ± 1.7 (3 seeds)", "-1.6"]
    # Each split's test videos, by the three trainings on it.
    for split in (1, 2, 3):
        assert re.search(rf"^UCF101 +{split} +test +97 +2 +1 +97.00 % +3$", text, re.MULTILINE)
    assert all(r.run.id in text for r in cell.results) and COMMIT[:12] in text


def test_one_seed_has_its_spread_over_splits_and_missing_splits_are_told(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, top1 in enumerate((0.5, 0.6, 0.7), 1):
        runs.training("hmdb51-imagenet/tsn-rgb", top1, split=split)
    runs.training("hmdb51-imagenet/i3d-rgb", 0.4, split=2)
    runs.training("kinetics400/i3d-rgb", 0.7111)
    assert main(["report", "--store", runs.uri]) == 0
    text = capsys.readouterr().out
    for number in ("60.0 ± 10.0 over splits (1 seed) ", "40.0 (1 seed, 1 of 3 splits) ", "71.1 (1 seed)  +0.0"):
        assert number in text
    cell = runs.cell("hmdb51-imagenet/tsn-rgb")
    assert cell.spread == (pytest.approx(stdev([0.5, 0.6, 0.7])), "splits")


def test_a_seed_with_fewer_splits_than_another_does_not_enter(runs: Runs) -> None:
    for split in (1, 2, 3):
        runs.training("hmdb51-imagenet/tsn-rgb", 0.5 + split / 100, split=split)
    short = runs.training("hmdb51-imagenet/tsn-rgb", 0.9, seed=1)
    assert runs.cell("hmdb51-imagenet/tsn-rgb").value == pytest.approx(0.52)
    assert runs.why_not(short, "hmdb51-imagenet/tsn-rgb") == "seed 1 has split 1 and seed 0 1, 2, 3: no spread of seeds"


def test_seeds_of_different_splits_have_no_spread_and_streams_of_different_seeds_are_no_seed(runs: Runs) -> None:
    cell, pair = "hmdb51-imagenet/tsn-rgb", ("ucf101-imagenet/rev2net", "ucf101-imagenet/i3d-flow")
    for seed, split in ((0, 1), (0, 2), (1, 2), (1, 3)):
        last = runs.training(cell, 0.5 + split / 10, seed=seed, split=split)
    assert runs.cell(cell).value == pytest.approx(0.65) and runs.cell(cell).seeds == 1
    assert runs.why_not(last, cell) == "seed 1 has split 2, 3 and seed 0 1, 2: no spread of seeds"
    rgb = runs.training(pair[0], 0.9)
    flows = [runs.training(pair[1], 0.9, seed=seed) for seed in (0, 1)]
    runs.test(rgb, flows[0], top1=0.7)
    mixed = runs.test(rgb, flows[1], top1=0.8)
    assert runs.cell(*pair).value == 0.7 and runs.cell(*pair).seeds == 1
    assert runs.why_not(mixed, *pair) == "its trainings are of different seeds"


def test_what_did_not_come_to_a_good_end_is_named_and_never_averaged(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"status": "FAILED"}, "it is FAILED"),
        ({"status": "RUNNING"}, "it is RUNNING"),
        ({"status": "KILLED"}, "it is KILLED"),
        ({"step": 60}, "it was stopped: no val/top1 after step 100"),  # preempted: FINISHED all the same
        ({"top1": float("nan")}, "its val/top1 is nan"),
        ({"top1": 37.0}, "its val/top1 is 37"),
        ({"params": {"train.seed": "abc"}}, "its train.seed, data.split and train.steps are not all numbers"),
        ({"params": {"train.steps": "²"}}, "its train.seed, data.split and train.steps are not all numbers"),
        ({"split": 4}, "data.split=4 is none of this cell's"),
        ({"words": ["data.holdout=0.1"]}, "its accuracy is of training clips that data.holdout=0.1 kept back"),
    ]
    for seed, (words, _) in enumerate(cases):
        runs.training("ucf101-imagenet/tsn-rgb", **{"top1": 0.9, "seed": seed, **words})
    cell = runs.cell("ucf101-imagenet/tsn-rgb")
    assert [r.why_not for r in cell.results] == [reason for _, reason in cases] and cell.value is None
    assert main(["report", "--store", runs.uri]) == 0
    text = capsys.readouterr().out
    assert "86.4           no run that counts" in text and "0 of 10 runs count." in text
    assert "Not finished: 1 FAILED, 1 KILLED, 1 RUNNING." in text
    assert all(f"no: {reason}" in text for _, reason in cases)
    runs.training("ucf101-imagenet/tsn-rgb", 0.8, seed=3)
    assert runs.cell("ucf101-imagenet/tsn-rgb").value == 0.8


def test_runs_of_other_kinds_are_left_out_and_counted(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.training("kinetics400/i3d-rgb", 0.7)
    runs.run(name=NASTY, params={"train.seed": "abc", "learning rate": "x"}, metrics=[("val/top1", float("inf"), 3)])
    runs.run(params={"tracking.cell": "nowhere/at-all"}, metrics=[("val/top1", 0.9, 100)])
    runs.run(tags={TESTS: "a run that is not there"}, metrics=[("test/top1", 0.9, 0)])
    deleted = runs.training("kinetics400/i3d-rgb", 0.9, seed=2)
    runs.client.delete_run(deleted)
    other = runs.client.create_experiment("another project")
    runs.client.create_run(other, run_name="empty")
    assert main(["report", "--store", runs.uri]) == 0
    text = capsys.readouterr().out
    assert "70.0 (1 seed)  -1.1" in text and "Runs of other kinds, left out: 4." in text and deleted not in text
    assert main(["report", "--store", runs.uri, "--experiment", "cells"]) == 0
    assert "Runs of other kinds, left out: 3." in capsys.readouterr().out
    assert main(["report", "--store", runs.uri, "--experiment", "another project"]) == 0
    assert "71.1             no run  -" in capsys.readouterr().out


def test_of_two_trainings_of_one_seed_and_split_the_newer_counts(runs: Runs) -> None:
    old, new = (runs.training("kinetics400/tsm-rgb", top1) for top1 in (0.9, 0.6))
    runs.training("kinetics400/tsm-rgb", 0.1, status="FAILED")
    assert runs.cell("kinetics400/tsm-rgb").value == 0.6
    assert runs.why_not(old, "kinetics400/tsm-rgb") == f"{new} is a newer one"


def test_a_trial_does_not_take_the_place_of_a_run_as_configured(runs: Runs) -> None:
    faithful = runs.training("kinetics400/tsm-rgb", 0.7)
    trial = runs.training("kinetics400/tsm-rgb", 0.1, words=["train.duration=10steps"])
    last = runs.training("kinetics400/tsm-rgb", 0.2, words=["train.duration=10steps"])
    cell = runs.cell("kinetics400/tsm-rgb")
    assert [r.run.id for r in cell.counted] == [faithful] and cell.value == 0.7 and not cell.deviates
    for run_id in (trial, last):
        assert runs.why_not(run_id, "kinetics400/tsm-rgb") == f"{faithful} is as configured"
    other = runs.training("kinetics400/tsm-rgb", 0.1, seed=1, words=["train.duration=10steps"])
    cell = runs.cell("kinetics400/tsm-rgb")
    assert [r.run.id for r in cell.counted] == [faithful] and cell.value == 0.7  # nor is it a part of the mean
    assert runs.why_not(other, "kinetics400/tsm-rgb") == f"it deviates, and {faithful} is as configured"
    pair = ("ucf101-imagenet/rev2net", "ucf101-imagenet/i3d-flow")
    streams = [runs.training(name) for name in pair]
    tested = runs.test(*streams, top1=0.9)
    runs.training(pair[0], words=["train.duration=10steps"])
    assert [r.run.id for r in runs.cell(*pair).counted] == [tested]


def test_a_test_under_the_configuration_s_views_takes_the_training_s_place(runs: Runs) -> None:
    quick = runs.training("kinetics400/i3d-rgb", 0.5, words=["eval.views=1x1"])
    assert runs.cell("kinetics400/i3d-rgb").deviates
    runs.test(quick, top1=0.6)
    last = runs.test(quick, top1=0.7)
    runs.test(quick, top1=0.8, views="10x1")
    cell = runs.cell("kinetics400/i3d-rgb")
    assert [r.run.id for r in cell.counted] == [last] and cell.value == 0.7 and not cell.deviates
    assert runs.why_not(quick, "kinetics400/i3d-rgb") == f"{last} counts instead"


def test_a_test_of_older_weights_does_not_count_for_a_training_that_has_gone_on(runs: Runs) -> None:
    training = runs.training("kinetics400/i3d-rgb", 0.5)
    tested = runs.test(training, top1=0.6)
    assert runs.cell("kinetics400/i3d-rgb").value == 0.6
    runs.client.set_tag(training, f"{CHANGED}train.steps", "200")
    runs.client.log_metric(training, "val/top1", 0.7, step=200)
    assert runs.cell("kinetics400/i3d-rgb").value == 0.7
    assert runs.why_not(tested, "kinetics400/i3d-rgb") == f"it tests step 100 of {training}, whose training has 200"


def test_a_setting_that_was_changed_and_changed_back_is_not_forgotten(runs: Runs) -> None:
    kept = runs.training("kinetics400/tsm-rgb", 0.7)
    own = runs.client.get_run(kept).data.params["optim.lr"]
    tags = {f"{CHANGED}optim.lr": own, f"{EARLIER}optim.lr": '["0.5"]', f"{EARLIER}optim.warmup": "{no list"}
    trial = runs.training("kinetics400/tsm-rgb", 0.3, tags=tags)
    cell = runs.cell("kinetics400/tsm-rgb")
    assert [r.run.id for r in cell.counted] == [kept]
    (found,) = [r.deviations for r in cell.results if r.run.id == trial]
    assert found == (f"optim.lr=0.5 before a resume ({own})",)


@pytest.mark.parametrize("seed", ["-1", "1760000000", "12345678901234567890"])
def test_any_whole_number_is_a_seed(runs: Runs, seed: str) -> None:
    runs.training("kinetics400/tsm-rgb", 0.7, params={"train.seed": seed})
    assert runs.cell("kinetics400/tsm-rgb").value == 0.7


def test_an_experiment_alone_still_knows_what_its_trainings_start_from(runs: Runs) -> None:
    start = runs.training("kinetics400/stm-rgb")
    elsewhere = runs.training("kinetics400/i3d-flow")
    runs.experiment = runs.client.create_experiment("finetuned", (runs.file.parent / "mlartifacts").as_uri())
    runs.training("hmdb51-kinetics/stm-rgb", 0.6, params={"init_from.run": start, "init_from.step": "100"})
    runs.test(runs.training("kinetics400/i3d-rgb"), elsewhere, top1=0.9)
    with reading(runs.uri) as store:
        report = read_report(store, ["finetuned"])
    assert not report.cells["hmdb51-kinetics/stm-rgb",].deviates and report.left_out == 0
    assert report.cells["kinetics400/i3d-rgb", "kinetics400/i3d-flow"].value == 0.9
    assert report.cells["kinetics400/stm-rgb",].value is None and report.cells["kinetics400/i3d-flow",].value is None


def test_a_test_of_a_training_that_is_not_there_is_told(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.test(runs.training("kinetics400/i3d-rgb"), "0" * 32)
    assert runs.report().left_out == 1
    assert main(["report", "--store", runs.uri]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: 1. 1 of them test a training of a cell beside one that is not in the store." in said


def test_a_store_whose_writer_was_killed_in_the_middle_is_read(runs: Runs) -> None:
    runs.training("kinetics400/tsm-rgb", 0.7)
    kill = (
        "import os, sqlite3, sys; file = sqlite3.connect(sys.argv[1]); file.execute('PRAGMA cache_size = 1')\n"
        "file.execute('BEGIN IMMEDIATE'); file.execute('DELETE FROM metrics'); file.execute('DELETE FROM params')\n"
        "file.execute('CREATE TABLE junk AS SELECT randomblob(100000)'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", kill, str(runs.file)])
    assert runs.file.with_name("mlflow.db-journal").is_file()
    assert runs.cell("kinetics400/tsm-rgb").value == 0.7


def test_two_streams_are_filled_by_their_own_test_alone(runs: Runs) -> None:
    pair = ("ucf101-imagenet/rev2net", "ucf101-imagenet/i3d-flow")
    values = {0: (0.96, 0.97, 0.98), 1: (0.98, 0.98, 0.98)}
    trained = {}
    for seed, splits in values.items():
        for split, top1 in enumerate(splits, 1):
            trained[seed, split] = [runs.training(name, 0.9, seed=seed, split=split) for name in pair]
            # Flow first: the order does not matter.
            runs.test(*reversed(trained[seed, split]), top1=top1)
    cell = runs.cell(*pair)
    assert cell.value == pytest.approx(mean([0.97, 0.98])) and cell.seeds == 2
    assert runs.cell(pair[0]).value == pytest.approx(0.9)
    # One stream is trained again: what tested the old one does not count any more.
    again = runs.training(pair[1], 0.9, seed=1, split=3)
    old = trained[1, 3]
    lost = next(r for r in runs.cell(*pair).results if {t.id for t in r.trainings} == set(old))
    assert lost.why_not == f"it tests {old[1]}, which does not count"
    runs.test(old[0], again, top1=0.5, views="1x1")
    cell = runs.cell(*pair)
    assert cell.value == pytest.approx(mean([0.97, (0.98 + 0.98 + 0.5) / 3]))
    assert cell.counted[-1].deviations == ("eval.views=1x1 (10x3)",)


def test_another_domain_s_accuracy_fills_the_cells_across_data_sets(runs: Runs) -> None:
    run_id = runs.training("ucf-to-hmdb/tsn-rgb", 0.4)
    runs.client.log_metric(run_id, "val/top1", 0.99, step=100)
    cell = runs.cell("ucf-to-hmdb/tsn-rgb")
    assert cell.value == 0.4 and cell.wanted.splits == (1,)


def test_what_deviates_from_the_configuration_is_listed(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train.duration=2epochs",
        "output=elsewhere",
        "data.path=/mnt/x",
        "loader.workers=3",
        "tracking.run_name=r",
    ]
    kinetics = {"init_from.run": runs.training("kinetics400/rev2net"), "init_from.step": "100"}
    params = {"model.imagenet": "/w.pth", "train.deepspeed.x": "1", **kinetics}
    runs.training("ucf101-kinetics/rev2net", words=words, params=params)
    runs.training("ucf101-kinetics/rev2net", split=2, words=["init_from=/mnt/w", "target.path=x"], params=kinetics)
    runs.training("ucf101-kinetics/rev2net", split=3, words=["init_from=null"], tags={"changed.optim.lr": "0.5"})
    results = runs.cell("ucf101-kinetics/rev2net").results
    assert [r.deviations for r in results] == [
        ("model.imagenet=a path (None)", "train.duration=2epochs (60epochs)", "train.deepspeed.x=1 (None)"),
        ("target.path=a path (None)",),
        ("optim.lr=0.5 (0.01)", "init_from=None (a path)"),
    ]
    start = {"init_from.run": runs.training("kinetics400/i3d-rgb", words=["eval.views=1x1"]), "init_from.step": "100"}
    runs.training("ucf101-kinetics/i3d-rgb", words=["optim.lr=7.0"], tags={"changed.optim.lr": "0.01"}, params=start)
    only = runs.cell("ucf101-kinetics/i3d-rgb").results[0]
    assert only.deviations == ("optim.lr=7.0 before a resume (0.01)",)
    assert main(["report", "--store", runs.uri]) == 0
    assert "50.0 ± 0.0 over splits (1 seed) *" in capsys.readouterr().out


def test_data_of_other_lists_or_classes_deviates_wherever_it_lies(runs: Runs) -> None:
    right = {"data.lists": "ucf101", "data.classes": "16", "target.lists": "hmdb51", "target.classes": "16"}
    wrong = [{}, {"data.classes": "12", "target.classes": "12"}, {"data.lists": "hmdb51", "target.lists": "none"}]
    for seed, params in enumerate(wrong):
        words = ["data.path=/mnt/x", "target.path=/mnt/y"]
        runs.training("ucf-to-hmdb/i3d-rgb", seed=seed, words=words, params=right | params)
    assert [r.deviations for r in runs.cell("ucf-to-hmdb/i3d-rgb").results] == [
        (),
        ("data.classes=12 (16)", "target.classes=12 (16)"),
        ("data.lists=hmdb51 (ucf101)", "target.lists=none (hmdb51)"),
    ]
    runs.training("ucf101-imagenet/i3d-rgb", split=2, params={"data.lists": "ucf101", "data.classes": "101"})
    runs.training("ucf101-imagenet/i3d-rgb", split=3)  # from before these were kept
    assert not runs.cell("ucf101-imagenet/i3d-rgb").deviates


def test_weights_that_a_cell_starts_from_must_be_those_of_a_good_training_of_that_cell(runs: Runs) -> None:
    starts = [
        runs.training("kinetics400/stm-rgb"),
        runs.training("kinetics400/stm-rgb", words=["train.duration=1epochs"]),
        runs.training("kinetics400/stm-rgb", step=10),
        runs.training("kinetics400/tsm-rgb"),
        "None",  # a published file
    ]
    for seed, start in enumerate(starts):
        runs.training("hmdb51-kinetics/stm-rgb", seed=seed, params={"init_from.run": start, "init_from.step": "100"})
    half = {"init_from.run": starts[0], "init_from.step": "50"}
    runs.training("hmdb51-kinetics/stm-rgb", seed=len(starts), params=half)
    other = "starts from weights that no run of kinetics400/stm-rgb in this store trained"
    bad = [f"starts from {start}, which deviates or did not come to its end" for start in starts]
    found = [r.deviations for r in runs.cell("hmdb51-kinetics/stm-rgb").results]
    early = f"starts from step 50 of {starts[0]}, whose training has 100"
    assert found == [(), (bad[1],), (bad[2],), (other,), (other,), (early,)]


def images(page: str) -> list[str]:
    return [base64.b64decode(found).decode() for found in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]


def test_the_page_has_curves_and_confusion_matrices_and_nothing_of_the_data_is_read_as_html(
    runs: Runs, tmp_path: Path
) -> None:
    classes = ["a$b$c", "<b>run</b>", "wave"]
    pair = [runs.training(name, name=NASTY) for name in ("kinetics400/i3d-rgb", "kinetics400/i3d-flow")]
    for run_id in pair:
        runs.confusion(run_id, "confusion_val.json", classes, [[3, 1, 0], [0, 4, 0], [0, 0, 4]])
    runs.confusion(runs.test(*pair), "confusion.json", classes, [[4, 0, 0], [0, 4, 0], [0, 0, 40]])
    odd = runs.training("kinetics400/tsm-rgb")
    runs.confusion(odd, "confusion_val.json", ["one"], [[1, 2], [3, 4]])
    assert main(["report", "--store", runs.uri, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;document.title" in page
    assert re.findall(r"(?:src|href)=\"(?!#|data:image/svg)", page) == [] and "url(" not in page
    drawn = images(page)
    # Curves of three single streams, matrices of two and of the fused pair.
    assert [sum(words in svg for svg in drawn) for words in ("cross-entropy, training", "predicted")] == [3, 3]
    assert all("a$b$c" in svg and "&lt;b&gt;run" in svg for svg in drawn if "predicted" in svg)
    assert "sum of 1 of 1 runs, 48 videos" in page and "artifacts are not there" in page
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert r"\<script\>" in markdown and r"\| \`x\` \[a\]" in markdown and "\x1b" not in markdown
    # In every row as many cells as in the head.
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_copy_on_another_machine_and_a_server_give_the_same_report(
    runs: Runs, tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    for split in (1, 2, 3):
        run_id = runs.training("ucf101-imagenet/i3d-rgb", 0.8, split=split)
        runs.confusion(run_id, "confusion_val.json", ["a", "b"], [[3, 1], [0, 4]])
    before = hashlib.sha256(runs.file.read_bytes()).hexdigest()

    def made(name: str, store: str) -> tuple[str, str]:
        assert main(["report", "--store", store, "--out", str(tmp_path / name)]) == 0
        return tuple((tmp_path / name / f"report.{kind}").read_text() for kind in ("md", "html"))  # type: ignore

    markdown, page = made("here", runs.uri)
    assert "sum of 3 of 3 runs, 24 videos" in page
    shutil.copy(runs.file, tmp_path / "server.db")
    mlflow_server.start()
    assert made("server", mlflow_server.uri) == (markdown, page)
    mlflow_server.stop()
    shutil.move(runs.file.parent, tmp_path / "moved")
    assert made("moved", str(tmp_path / "moved" / "mlflow.db")) == (markdown, page)
    shutil.rmtree(tmp_path / "moved" / "mlartifacts")
    alone, poorer = made("alone", f"sqlite:///{tmp_path}/moved/mlflow.db")
    assert alone == markdown and "artifacts are not there" in poorer and "Learning curves" in poorer
    assert hashlib.sha256((tmp_path / "moved" / "mlflow.db").read_bytes()).hexdigest() == before


def test_p12_a_store_that_is_none_is_refused_and_not_made(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, empty: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for words in ([], ["--store", "sqlite:///gone.db"], ["--store", "gone.db"], ["--store", "file:///gone"]):
        assert "there is no MLflow store at" in refused("report", *words)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert "sqlite:///other.db" in refused("report")
    with sqlite3.connect(tmp_path / "foreign.db") as other:
        other.execute("CREATE TABLE t (x)")
    (tmp_path / "text.db").write_text("this is no database" * 100)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "no MLflow store" in refused("report", "--store", "foreign.db")
    assert "cannot be read as an SQLite database" in refused("report", "--store", "text.db")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    shutil.copy(empty, tmp_path / "newer.db")
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    assert "Detected out-of-date database schema (found version ffffffffffff" in refused(
        "report", "--store", "newer.db"
    )
    assert "has no experiment 'x'; it has Default" in refused("report", "--store", str(empty), "--experiment", "x")
    assert "is a file" in refused("report", "--store", str(empty), "--out", "text.db")
    begin = time.monotonic()
    assert "MLflow cannot read the store http://127.0.0.1:9" in refused("report", "--store", "http://127.0.0.1:9")
    assert time.monotonic() - begin < 60, "MLflow's own patience is minutes"
