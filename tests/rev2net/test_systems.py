"""Every system of the paper: a configuration for each cell of its tables, built, stepped, trained and tested."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import TINY

from dataloaders.batch import ClipBatch
from dataloaders.plan import ClipShape
from dataloaders.prepare_cli import SPLIT_NUMBERS
from dataloaders.shards import DataSet
from rev2net import checkpoint, evaluate
from rev2net.cli import main
from rev2net.config import Config, load_config
from rev2net.data import clip_shape
from rev2net.engine import TrainingStep
from rev2net.evaluate import Scores
from rev2net.models import Rev2Net
from rev2net.models.build import build_network
from rev2net.models.dann import DomainDiscriminator
from rev2net.optim import build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
TABLES = yaml.safe_load((CONFIGS / "tables.yaml").read_text())
CELLS = sorted({run for table in TABLES.values() for row in table["rows"] for c in row["cells"] for run in c["runs"]})
WITH_WIDTH, WITH_RESNET18 = ("rev2net", "i3d", "actionflownet"), ("tsn", "tsm", "off")


def reduced(config: Config) -> list[str]:
    """Overrides that leave a configuration what it is, and make it small."""
    words = ["data.size=32", "model.imagenet=null"]
    words += ["data.frames=8"] if not config.data.segments else []
    words += ["model.width=0.125"] if config.model.name in WITH_WIDTH else []
    words += ["model.backbone=resnet18"] if config.model.name in WITH_RESNET18 else []
    return words


def test_the_tables_are_the_paper_s(shared_annotations: Path) -> None:
    """Models, inputs and numbers, read out of the paper's text."""
    text = (shared_annotations.parent / "rev2net-paper.txt").read_text()
    for number in range(1, 6):
        block = re.search(rf"Table {number}\. .*?\n\nModel\tInput.*?\n(.*?)\n\n", text, re.DOTALL)
        assert block is not None
        rows = [line.split("\t") for line in block[1].splitlines()]
        assert [row[:2] for row in rows] == [[r["model"], r["input"]] for r in TABLES[f"table{number}"]["rows"]]
        ours = [[cell["paper"] for cell in row["cells"]] for row in TABLES[f"table{number}"]["rows"]]
        assert [[None if v == "-" else float(v) for v in row[2:]] for row in rows] == ours


def test_two_streams_are_one_of_rgb_and_one_of_flow() -> None:
    for table in TABLES.values():
        for row in table["rows"]:
            wanted = {"RGB": ["rgb"], "Flow": ["flow"]}.get(row["input"], ["rgb", "flow"])
            assert len(row["cells"]) == len(table["columns"])
            for cell in row["cells"]:
                assert [load_config(CONFIGS / f"{run}.yaml").model.input for run in cell["runs"]] == wanted


def test_a_start_from_kinetics_is_a_run_on_kinetics_of_the_same_network() -> None:
    """The three splits of the fine-tuned data sets have a folder each."""
    for run in CELLS:
        config = load_config(CONFIGS / f"{run}.yaml")
        if run.partition("/")[0].endswith("-kinetics"):
            assert config.init_from is not None and config.model.imagenet is None
            start = load_config(CONFIGS / f"{config.init_from.removeprefix('runs/')}.yaml")
            assert start.output == config.init_from
            assert (start.model.name, start.model.input, start.data.frames, start.data.segments) == (
                *(config.model.name, config.model.input, config.data.frames, config.data.segments),
            )
        else:
            assert config.init_from is None and config.model.imagenet == "auto"
        if run.startswith(("ucf101-", "hmdb51-")):
            splits = [load_config(CONFIGS / f"{run}.yaml", [f"data.split={n}"]) for n in SPLIT_NUMBERS]
            assert len({c.output for c in splits}) == len({c.data.path for c in splits}) == 3
            assert all(c.data.path.endswith(f"-{n}") for n, c in zip(SPLIT_NUMBERS, splits, strict=True))


def stepped() -> dict[str, Config]:
    """The cells at a reduced size, and of those whose steps are the same the first."""
    configs = {run: CONFIGS / f"{run}.yaml" for run in (*CELLS, "kinetics400/stm-rgb")}
    found: dict[str, tuple[str, Config]] = {}
    for run, path in configs.items():
        config = load_config(path, [*reduced(load_config(path)), "optim.lr=0.01", "optim.weight_decay=1e-4"])
        of_run = {"output", "init_from", "tracking", "train", "eval", "augment", "loader"}
        of_data = {"path", "split", "train_split", "val_split", "holdout"}
        of_schedule = {"lr_batch", "schedule", "warmup", "milestones", "gamma"}
        left_out = dict.fromkeys(of_run, True) | {"data": of_data, "target": of_data, "optim": of_schedule}
        key = f"{config.target.dann} {config.model_dump_json(exclude=left_out)}"
        found.setdefault(key, (run, config))
    return dict(found.values())


@pytest.mark.parametrize(("run", "config"), stepped().items())
def test_every_cell_takes_steps_that_lower_its_loss(run: str, config: Config) -> None:
    """All parameters get a gradient, and the loss of the same clips falls."""
    torch.manual_seed(0)
    network = build_network(config, 5)
    step = TrainingStep(network.train(), config.loss.objective(), config.target.weight)
    step.reversal = 0.5
    optimizer = build_optimizer(network, config.optim)
    channels = {"rgb": 3, "flow": 2}[config.model.input]
    clips = torch.rand(4, channels, config.data.frames, 32, 32) * 2 - 1
    flow = torch.rand(2, 2, config.data.frames, 32, 32) - 0.5 if "flow" in config.decoders else None
    label = torch.tensor([1, 3])
    seen = clips if config.target.dann else clips[:2]
    losses = []
    for _ in range(4):
        scalars = step(seen, flow, label, torch.Generator().manual_seed(0))
        losses.append((scalars["loss/total"].item(), scalars["loss/ce"].item()))
        optimizer.zero_grad()
        scalars["loss/total"].backward()
        optimizer.step()
    # OFF's last unit sees one pixel of these clips, which has no gradient in space.
    flat = ["encoder.units.2.spatial.weight"] if config.model.name == "off" else []
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == flat
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < 0.8 * losses[0][1]
    assert ("loss/domain" in scalars) == ("-to-" in run)
    assert network.encoder.eval()(clips).shape == (4, 5)


def test_what_the_configuration_says_of_a_network_reaches_it() -> None:
    """Each key with another value than its default."""
    words = [*TINY, "model.decoder_channels=8", "model.decoder_skip=flow", "model.latent_noise=false", "data.stride=3"]
    words += ["model.dropout=0.25", "model.activation_checkpointing=true", "target.path=b", "target.hidden=16"]
    config = load_config("configs/demo.yaml", ["output=o", "data.path=a", *words])
    network = build_network(config, 5)
    assert isinstance(network, Rev2Net) and isinstance(network.discriminator, DomainDiscriminator)
    assert (network.hidden, network.skips, network.noise) == (8, ("flow",), False)
    assert (network.encoder.dropout, network.encoder.activation_checkpointing) == (0.25, True)
    assert network.discriminator.out.in_features == 16
    assert clip_shape(config) == ClipShape(frames=8, height=64, width=64, stride=3)
    words = ["model.backbone=resnet18", "model.partial_bn=true", "model.dropout=0.25", "model.imagenet=null"]
    for cell in ("hmdb-to-ucf/tsn-flow", "kinetics400/tsm-rgb", "kinetics400/stm-rgb", "hmdb51-imagenet/off-rgb"):
        config = load_config(CONFIGS / f"{cell}.yaml", words if "stm" not in cell else words[1:])
        encoder = build_network(config, 5).encoder
        assert (encoder.dropout, encoder.partial_bn) == (0.25, True), cell
    config = load_config(CONFIGS / "ucf101-imagenet/actionflownet.yaml", words[2:])
    assert build_network(config, 5).encoder.dropout == 0.25


@pytest.fixture(scope="module")
def runs(tiny_data: Path, other_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cell of each network, trained for two steps by `rev2net train`."""
    folder = tmp_path_factory.mktemp("systems")
    made = {}
    for run in (
        *("hmdb-to-ucf/tsn-flow", "ucf101-imagenet/actionflownet", "hmdb51-imagenet/off-rgb"),
        *("kinetics400/stm-rgb", "kinetics400/tsm-rgb", "kinetics400/i3d-flow"),
    ):
        path = CONFIGS / f"{run}.yaml"
        config = load_config(path)
        output = folder / run.replace("/", "-")
        words = [word for word in TINY if not word.startswith(("data.", "model."))]
        words += [*reduced(config), f"data.path={tiny_data}", f"output={output}", "train.duration=2steps"]
        words += ["loader.pipelines_per_gpu=1", "train.eval_every=null", "loss.ddp_low_from=0", "init_from=null"]
        words += ["train.precision=auto"]  # the cells' own bf16 takes minutes where it is emulated
        words += [f"target.path={other_data}"] if config.target.path else []
        assert main(["train", str(path), *words]) == 0
        made[run] = output
    return made


def test_every_network_trains_and_is_tested_by_the_commands(
    runs: dict[str, Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, output in runs.items():
        result = yaml.safe_load((output / "result.json").read_text())
        assert result["step"] == 2 and 0 <= result["metrics"]["val/top1"] <= 1
        assert ("target/top1" in result["metrics"]) == ("-to-" in run)
        videos = {"val": 8, "target": 16} if "-to-" in run else {"val": 8}
        for name, number in videos.items():
            matrix = json.loads((output / f"confusion_{name}.json").read_text())["confusion"]
            assert [sum(row) for row in matrix] == 8 * [number // 8]
            right = sum(row[i] for i, row in enumerate(matrix))
            assert result["metrics"][f"{name}/top1"] == pytest.approx(right / number)
        assert main(["eval", str(output), str(tiny_data), "--views", "2x1", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["videos"] == 8
        assert main(["eval", str(output), str(tiny_data), "--views", "1x1", "--split", "train", "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["videos"] == 16
        state = checkpoint.read_tensors(checkpoint.find(output), "weights")
        assert any(name.startswith("discriminator.") for name in state) == ("-to-" in run)
        untaught = (
            "model.partial_bn=true keeps statistics that nobody has learned" in (output / "train.log").read_text()
        )
        assert untaught == ("tsn" in run)


def test_clips_are_played_backwards_where_that_is_asked_for(
    runs: dict[str, Path], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    whole = evaluate.score

    def spied(network: torch.nn.Module, batches: Iterable[ClipBatch], **words: Any) -> evaluate.Scores:
        kept = list(batches)
        seen.append(torch.cat([batch.stream("rgb") for batch in kept]))
        return whole(network, kept, **words)

    monkeypatch.setattr(evaluate, "score", spied)
    words = ["eval", str(runs["kinetics400/tsm-rgb"]), str(tiny_data), "--views", "1x1"]
    assert main(words) == main([*words, "--backwards"]) == 0
    assert torch.equal(seen[0].flip(2), seen[1])


def test_dann_is_logged(runs: dict[str, Path]) -> None:
    log = (runs["hmdb-to-ucf/tsn-flow"] / "train.log").read_text()
    assert re.search(r"step 2/2 .* domain 0\.\d+ domain/accuracy [01]\.\d+ ", log)


def test_two_streams_are_fused(
    runs: dict[str, Path],
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    rgb, flow = runs["kinetics400/tsm-rgb"], runs["kinetics400/i3d-flow"]
    views = ["--views", "1x1"]
    assert main(["eval", str(rgb), str(tiny_data), "--fuse", str(flow), *views]) == 0
    assert f"{checkpoint.find(rgb)} and {checkpoint.find(flow)} on {tiny_data}" in capsys.readouterr().out
    assert main(["splits", str(rgb), "--fuse", str(flow), *views]) == 0
    assert re.search(r"mean of 1 splits: top1 [\d.]+%\n", capsys.readouterr().out)
    again = refused("splits", str(rgb), str(rgb), "--fuse", str(flow), str(flow), *views)
    assert f"{rgb} and {rgb} are tested on the same split" in again
    shutil.copytree(tiny_data, tmp_path / "data")
    with (tmp_path / "data" / "dataset.json").open("a") as manifest:
        manifest.write("\n")  # another hash: another data set
    shutil.copytree(rgb, tmp_path / "second")
    second = checkpoint.find(tmp_path / "second") / "state.json"
    second.write_text(second.read_text().replace(f'"path": "{tiny_data}"', f'"path": "{tmp_path}/data"', 1))
    with monkeypatch.context() as patch:  # what two networks of two steps reach may be equal
        reached = iter((0.5, 0.75))
        tested: list[tuple[Path, str, str]] = []

        def test(streams: Sequence[Any], data: DataSet, split: str, *_: object) -> Scores:
            tested.append((streams[0].checkpoint, str(data.location), split))
            right = 8 * next(reached)
            rows = {video: np.eye(8)[0 if video < right else 1] for video in range(8)}
            return Scores(sums=rows, views=dict.fromkeys(rows, 1), labels=dict.fromkeys(rows, 0))

        patch.setattr("rev2net.eval_cli._test", test)
        assert main(["splits", str(rgb), str(tmp_path / "second"), *views]) == 0
        assert capsys.readouterr().out.endswith("mean of 2 splits: top1 62.5% +- 17.7%\n")
        checkpoints = [checkpoint.find(path) for path in (rgb, tmp_path / "second")]
        assert tested == [(checkpoints[0], str(tiny_data), "val"), (checkpoints[1], str(tmp_path / "data"), "val")]
        known = json.loads(second.read_text())
        second.write_text(json.dumps({**known, "classes": ["swim", *known["classes"][1:]]}))
        text = refused("splits", str(rgb), str(tmp_path / "second"), *views)
        assert "evaluate on data prepared with the same classes" in text and len(tested) == 2  # no test before it
    assert "give --fuse one for each split" in refused("splits", str(rgb), str(rgb), "--fuse", str(flow))
    shutil.copytree(flow, tmp_path / "other")
    state = checkpoint.find(tmp_path / "other") / "state.json"
    tree = json.loads(state.read_text())
    tree["classes"][0] = "swim"
    state.write_text(json.dumps(tree))
    text = refused("eval", str(rgb), str(tiny_data), "--fuse", str(tmp_path / "other"))
    assert "knows 8 classes and" in text and "differ in" in text and text.endswith("fuse streams of the same classes")
    assert "--views whole takes every frame" in refused("eval", str(rgb), str(tiny_data), "--views", "whole")
