"""`rev2net eval --log`: which tests are kept in MLflow, beside real trainings, and what the report makes of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from tiny import TINY

from rev2net import checkpoint
from rev2net.cli import main
from rev2net.report import CONFIGS, read_report
from rev2net.store import reading


@pytest.fixture(scope="module")
def streams(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two real trainings of two steps, RGB and flow, with the same clips as the other domain's."""
    folder = tmp_path_factory.mktemp("streams")
    made = []
    for name in ("tsn-rgb", "tsn-flow"):
        words = [word for word in TINY if not word.startswith(("data.", "model."))]
        words += ["data.size=32", "model.imagenet=null", "model.backbone=resnet18", "train.eval_every=null"]
        words += ["train.duration=2steps", "train.checkpoint_every=1steps", "loader.pipelines_per_gpu=1"]
        words += ["data.segments=2", f"data.frames={2 if name == 'tsn-rgb' else 4}"]
        words += ["train.precision=auto"]  # the cells' own bf16 takes minutes where it is emulated
        words += ["loss.ddp_low_from=0", f"data.path={tiny_data}", f"target.path={tiny_data}"]
        made.append(folder / name)
        config = CONFIGS / "hmdb-to-ucf" / f"{name}.yaml"
        assert main(["train", str(config), *words, f"output={folder / name}"]) == 0
    return made


def test_real_trainings_and_their_fused_test_fill_three_cells(
    streams: list[Path], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb, flow = map(str, streams)
    scores = tmp_path / "scores.json"
    words = ["eval", rgb, str(tiny_data), "--fuse", flow, "--views", "1x1", "--json", str(scores), "--log"]
    assert main(words) == 0
    store = f"sqlite:///{streams[0].parent}/mlflow.db"
    kept = re.search(rf"kept in MLflow at {re.escape(store)} as the run ([0-9a-f]{{32}})", capsys.readouterr().out)
    assert kept is not None
    with reading(store) as opened:
        report = read_report(opened)
        fused = report.cells["hmdb-to-ucf/tsn-rgb", "hmdb-to-ucf/tsn-flow"]
        test = fused.counted[0].run
        matrix = json.loads(opened.artifact(test, "confusion.json") or b"")
    wanted = json.loads(scores.read_text())
    assert (test.id, fused.value) == (kept[1], wanted["top1"]) and test.metrics["test/videos"] == 8
    assert matrix == {key: wanted[key] for key in ("classes", "confusion")}
    for name, folder in zip(("tsn-rgb", "tsn-flow"), streams, strict=True):
        cell = report.cells[(f"hmdb-to-ucf/{name}",)]
        assert cell.value == json.loads((folder / "result.json").read_text())["metrics"]["target/top1"]
        params = cell.counted[0].run.params
        assert {"data.lists=none (hmdb51)", "target.classes=8 (16)"} <= set(cell.counted[0].deviations)
        assert params["train.steps"] == "2" and params["data.train.videos"] == "16"
        counts = [params[f"target.val.{kind}"] for kind in ("videos", "missing", "quarantined")]
        assert counts == ["8", "0", "0"]
        assert "train.duration=2steps (60epochs)" in cell.counted[0].deviations and "eval.views=1x1 (10x3)" in (
            cell.counted[0].deviations
        )
    assert main(["report", "--store", store, "--out", str(tmp_path)]) == 0
    assert "| test | 8 | 0 | 0 | 100.00 % |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().count(
        "<figcaption>Confusion matrix, sum of 1 of 1 runs, 8 videos<"
    ) == 3


def test_only_the_protocol_s_tests_are_kept(
    streams: list[Path], tiny_data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    rgb = str(streams[0])
    views = ("--views", "1x1", "--log")
    early = str(streams[0] / "checkpoints" / "step-00000001")
    assert "stands at step 1 of 2" in refused("eval", early, str(tiny_data), *views)
    assert "is not what" in refused("eval", rgb, str(tiny_data), "--split", "train", *views)
    assert "--backwards" in refused("eval", rgb, str(tiny_data), "--backwards", *views)
    shutil.copytree(tiny_data, tmp_path / "other")
    with (tmp_path / "other" / "dataset.json").open("a") as file:
        file.write("\n")
    assert f"which is {tiny_data}, split val" in refused("eval", rgb, str(tmp_path / "other"), *views)
    shutil.copytree(streams[0], tmp_path / "away")
    assert "there is no MLflow store at" in refused("eval", str(tmp_path / "away"), str(tiny_data), *views)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_test_that_mlflow_does_not_take_is_written_all_the_same(
    streams: list[Path],
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def away(*_: object) -> str:
        raise MlflowException("the server is away\nfor long")

    monkeypatch.setattr("rev2net.evaluation_log.EvaluationLog.write", away)
    scores = tmp_path / "scores.json"
    words = ["eval", str(streams[0]), str(tiny_data), "--views", "1x1", "--json", str(scores), "--log"]
    assert main(words) == 1
    assert json.loads(scores.read_text())["videos"] == 8
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "failed: " in line]
    assert "the test is not kept in MLflow at sqlite:///" in sentence and "(the server is away)" in sentence


def test_p12_another_official_split_holds_clips_that_the_network_has_learned_from(
    streams: list[Path],
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    def marked(path: Path, official: dict[str, object], name: str, key: str = "official") -> None:
        tree = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**tree, key: official}))

    shutil.copytree(streams[0], tmp_path / "run")
    shutil.copytree(tiny_data, tmp_path / "data")
    marked(checkpoint.find(tmp_path / "run"), {"lists": "ucf101", "split": 1}, "state.json")
    words = ("eval", str(tmp_path / "run"), str(tmp_path / "data"), "--views", "1x1")
    marked(tmp_path / "data", {"lists": "ucf101", "split": 2}, "dataset.json")
    assert "trained on the official split 1, and" in refused(*words)
    for other in ({"lists": "hmdb51", "split": 2}, {"lists": "ucf101", "split": 1}):
        marked(tmp_path / "data", other, "dataset.json")
        assert main(list(words)) == 0
    # As the target domain's unlabelled clips.
    marked(checkpoint.find(tmp_path / "run"), {"lists": "hmdb51", "split": 1}, "state.json", "target_official")
    marked(tmp_path / "data", {"lists": "hmdb51", "split": 2}, "dataset.json")
    assert "trained on the official split 1, and" in refused(*words)
