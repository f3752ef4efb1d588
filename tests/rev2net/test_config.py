"""The configuration: what is read, what is refused and in which words, durations."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dataloaders.errors import UserError
from rev2net.config import Config, config_from_tree, load_config, parse_duration, parse_range, to_steps
from rev2net.distributed import Ranks
from rev2net.engine import micro_batches
from rev2net.losses import Objective
from rev2net.models.build import build_network

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(p for p in CONFIGS.glob("*.yaml") if p.name != "tables.yaml")
CELLS = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.parent.name not in ("bases", "classes", "cluster"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("output: out\ndata: {path: data, frames: 8, size: 32}\nmodel: {width: 0.03125}\n")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text and "Value error" not in text
    return text


def with_decoders(**model: Any) -> Config:
    return config_from_tree({"output": "o", "data": {"path": "d", "frames": 8, "size": 32}, **model})


def test_there_are_experiments() -> None:
    assert "demo.yaml" in [path.name for path in EXPERIMENTS]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_loads_and_builds_its_network(path: Path) -> None:
    config = load_config(path, ["model.imagenet=null"])
    with torch.device("meta"):
        network = build_network(config, 5)
        clip = torch.empty(2, 3, config.data.frames, config.data.size, config.data.size)
        output = network.heads(clip)
    assert output.logits.shape == (2, 5)
    assert (output.flow is not None, output.frames is not None) == tuple(
        d in config.decoders for d in ("flow", "frame")
    )
    assert config.loss.objective().weights()["loss/flow"] == config.loss.lambda_flow
    if config.decoders:  # the paper leaves them open: an experiment says which it means
        assert {"reduction", "ddp_low_reduction"} <= yaml.safe_load(path.read_text())["loss"].keys()


@pytest.mark.parametrize("path", [*EXPERIMENTS, *CELLS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_yaml_gives_back_the_whole_configuration(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.yaml())
    assert load_config(copy) == config
    assert config_from_tree(config.model_dump(mode="json")) == config  # what a checkpoint holds


def test_overrides_are_yaml_and_the_last_one_counts(small: Path) -> None:
    overrides = [
        "optim.lr=1e-3",
        "train.seed=1",
        "train.seed=7",
        "augment.scales=[1, 0.5]",
        "model.imagenet=null",
        "train.channels_last=false",
        "train.duration=1e3samples",
        "tracking.run_name=a=b",
        "train.deepspeed={comms_logger: {enabled: true}}",
        "data.path=elsewhere",
    ]
    config = load_config(small, overrides)
    assert config.optim.lr == 0.001
    assert config.train.seed == 7
    assert config.augment.scales == (1.0, 0.5)
    assert config.model.imagenet is None
    assert config.train.channels_last is False
    assert config.train.duration == "1e3samples"
    assert config.tracking.run_name == "a=b"
    assert config.train.deepspeed == {"comms_logger": {"enabled": True}}
    assert (config.data.path, config.data.frames) == ("elsewhere", 8)
    assert load_config(small).data.path == "data"


def test_the_defaults_are_the_paper_s(small: Path) -> None:
    config = load_config(small)
    assert config.loss.objective() == Objective(
        ddp="both", alpha=0.01, beta=0.1, lambda_flow=0.1, lambda_im=0.1, reduction="frobenius", ddp_low_reduction="rms"
    )
    assert config.decoders == ("flow", "frame")


def test_flat_names_every_value(small: Path) -> None:
    flat = load_config(small, ["train.seed=3"]).flat()
    assert flat["train.seed"] == "3"
    assert flat["data.path"] == "data"
    assert flat["augment.scales"] == "[1.0, 0.875, 0.75, 0.66]"
    assert not any(value.startswith("{") and value != "{}" for value in flat.values())


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("data.frmes=8", "data.frames"),
        ("modle.width=1", "model"),
        ("loss.betta=1", "loss.beta"),
        ("train.gobal_batch=4", "train.global_batch"),
        ("ouput=x", "output"),
        ("train.lr=0.1", "optim.lr"),
        ("ddp=none", "loss.ddp"),
    ],
)
def test_p12_an_unknown_key_is_refused_with_the_nearest_valid_one(small: Path, override: str, nearest: str) -> None:
    key = override.split("=")[0].split(".")[0] if nearest == "model" else override.split("=")[0]
    assert refusal(small, override) == f"unknown configuration key {key!r}; the nearest valid key is {nearest!r}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_batch=many", r"^train\.global_batch='many': .*integer"),
        ("train.global_batch=2.5", r"^train\.global_batch=2\.5: .*integer"),
        ("train.micro_batch=0", r"^train\.micro_batch=0: .*greater than 0"),
        ("model.flow_decoder=perhaps", r"^model\.flow_decoder='perhaps': .*boolean"),
        ("target.decode=true", r"^target\.decode=true has no clips to learn from: give target\.path"),
        ("optim.schedule=step", r"^optim\.schedule=step has no milestones"),
        ("loss.ddp=all", r"^loss\.ddp='all': .*'none', 'low', 'high' or 'both'"),
        ("loss.alpha=-1", r"^loss\.alpha=-1: .*greater than or equal to 0"),
        ("train.precision=fp64", r"^train\.precision='fp64': .*'auto', 'fp32', 'bf16' or 'fp16'"),
        ("train.precision=fp16", r"^train\.precision=fp16 does not work with train\.zero_stage=1; use .*bf16"),
        ("train.zero_stage=4", r"^train\.zero_stage=4: .*0, 1, 2 or 3"),
        ("augment.scales=[1, x]", r"^augment\.scales='x': .*number"),
        ("train.duration=[1]", r"^train\.duration=\[1\]: "),
        ("train=5", r"^train=5: "),
        ("data.frames=12", r"^data\.frames=12 must be a multiple of 8 for model\.name=rev2net$"),
        ("model.name=slowfast", r"^model\.name='slowfast': .*'rev2net', 'i3d', 'tsn'"),
        ("model.input=flow", r"model\.input=flow does not go with model\.name=rev2net, .*use model\.input=rgb"),
        ("model.backbone=resnet18", r"^model\.backbone=resnet18 is for tsn, tsm, stm, off, but the network is rev2net"),
        ("data.segments=4", r"^data\.segments=4 is for tsn, tsm, stm, off, but model\.name=rev2net sees motion"),
        ("data.size=30", r"^data\.size=30 must be a multiple of 4 and at least 32$"),
        ("data.size=16", r"^data\.size=16 must be"),
        ("eval.views=2x2", r"^views '2x2' are unknown; give Tx1 or Tx3"),
        ("profile.steps=9-3", r"^profile\.steps='9-3' is not a range of steps: write FIRST-LAST"),
        ("train.global_batch=9", r"^train\.global_batch=9 is not a multiple of train\.micro_batch=4; change one"),
        ("optim.lr=1.2.3e4", r"^optim\.lr='1\.2\.3e4': .*number"),
        ("optim.momentum=-1", r"^optim\.momentum=-1: .*greater than or equal to 0"),
        ("optim.betas=[0.9, 1]", r"^optim\.betas=1: .*less than 1"),
        ("train.seed", r"^'train\.seed' is not an override: write key=value"),
        ("=3", r"^'=3' is not an override"),
        ("output.x=1", r"'output', which is a value and has no keys$"),
        ("train.seed=[1", r"not valid YAML"),
    ],
)
def test_p12_a_wrong_value_is_refused_in_one_sentence(small: Path, override: str, words: str) -> None:
    assert re.search(words, refusal(small, override))


@pytest.mark.parametrize("text", ["5 hours", "soon", "-5", "1.2.3steps", "steps", "1e999steps", "", "٣steps"])
@pytest.mark.parametrize("key", ["train.duration", "train.checkpoint_every", "train.eval_every", "optim.warmup"])
def test_p12_a_bad_duration_is_refused_before_anything_starts(small: Path, key: str, text: str) -> None:
    assert refusal(small, f"{key}='{text}'") == (
        f"{key}={text!r} is not a duration: write 300steps, 20epochs or 1e6samples"
    )


def test_p12_bad_milestones_and_empty_runs_are_refused(small: Path) -> None:
    assert "optim.milestones='x' is not a duration" in refusal(small, "optim.milestones=[1epochs, x]")
    for key in ("duration", "checkpoint_every", "eval_every"):
        assert refusal(small, f"train.{key}=0epochs") == f"train.{key}=0epochs is nothing: give at least 1steps"
    assert load_config(small, ["optim.warmup=0"]).optim.warmup == 0


def test_p12_what_is_missing_is_named(tmp_path: Path, small: Path) -> None:
    assert refusal(tmp_path / "no.yaml").startswith(f"there is no configuration file {tmp_path / 'no.yaml'}")
    for text, words in (("", "lacks 'output'"), ("output: o", "lacks 'data'"), ("[1]", "holds list"), ("a: [", "YAML")):
        small.write_text(text)
        assert words in refusal(small)


def test_p12_one_decoder_leaves_nothing_to_compare(small: Path) -> None:
    for decoder in ("flow", "frame"):
        off = f"model.{decoder}_decoder=false"
        for ddp in ("low", "high", "both"):
            text = refusal(small, off, f"loss.ddp={ddp}")
            assert text.startswith(f"loss.ddp={ddp} compares two decoders, but this model has 1; set loss.ddp=none")
        other = "frame" if decoder == "flow" else "flow"
        assert load_config(small, [off, "loss.ddp=none"]).decoders == (other,)
    assert "has 0" in refusal(small, "model.name=i3d")
    assert load_config(small, ["model.name=i3d", "loss.ddp=none"]).decoders == ()


def test_p12_what_does_not_fit_a_network_of_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tsm.yaml"
    path.write_text("output: o\ndata: {path: d, frames: 8, segments: 8}\nmodel: {name: tsm}\nloss: {ddp: none}\n")
    assert load_config(path).data.stack == 1
    assert load_config(path, ["data.frames=40", "model.input=flow"]).data.stack == 5
    assert load_config(path, ["data.frames=20", "data.segments=0"]).data.stack == 1  # any number of frames
    assert refusal(path, "data.segments=3").startswith("data.frames=8 cannot be shared out to data.segments=3")
    assert refusal(path, "model.width=0.5").startswith("model.width=0.5 is for rev2net, i3d, actionflownet, but")
    assert refusal(path, "eval.views=whole").startswith("eval.views=whole takes every frame")
    assert "compares neighbouring images" in refusal(path, "model.name=off", "data.segments=1")


def test_a_file_lies_over_its_bases(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "a.yaml").write_text("output: a\ndata: {path: a, frames: 8}\noptim: {lr: 0.5}\n")
    (tmp_path / "bases" / "b.yaml").write_text("base: a.yaml\ndata: {path: 'b-{split}', size: 64}\n")
    (tmp_path / "bases" / "c.yaml").write_text("data: {size: 32}\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: [bases/b.yaml, bases/c.yaml]\noutput: runs/top-{split}\n")
    config = load_config(top, ["data.split=3"])
    assert (config.output, config.data.path, config.data.frames, config.data.size) == ("runs/top-3", "b-3", 8, 32)
    assert config.optim.lr == 0.5
    assert config_from_tree(config.model_dump(mode="json")) == config
    (tmp_path / "bases" / "a.yaml").write_text("base: ../top.yaml\n")
    assert "is its own base, through" in refusal(top)
    top.write_text("base: 5\n")
    assert refusal(top) == f"{top} has base: 5; give a file beside it, a list of them, or no `base`"
    top.write_bytes(b"output: \xff\n")
    assert "is not valid YAML" in refusal(top)
    top.write_text("train:\n  seed: 1\ntrain:\n  duration: 7steps\n")
    assert re.search(r"is not valid YAML: 'train' stands twice .*line 3", refusal(top))
    top.write_text("base: [nowhere.yaml]\n")
    assert refusal(top).startswith(f"there is no file {tmp_path / 'nowhere.yaml'}, the base of {top}: give")


def test_ddp_changes_the_loss_and_never_the_network() -> None:
    keys = set()
    for ddp in ("none", "low", "high", "both"):
        config = with_decoders(loss={"ddp": ddp})
        with torch.device("meta"):
            keys.add(tuple((k, v.shape) for k, v in build_network(config, 4).state_dict().items()))
        assert config.loss.objective().ddp == ddp
    assert len(keys) == 1


def test_p12_ranks_that_cannot_share_the_batch_are_told_which_can() -> None:
    config = with_decoders(train={"global_batch": 24, "micro_batch": 2})

    def ranks(world: int) -> Ranks:
        return Ranks(rank=0, world_size=world, local_rank=0, device=torch.device("cpu"))

    assert [micro_batches(config, ranks(w)) for w in (1, 2, 3, 12)] == [12, 6, 4, 1]
    for world in (5, 24):
        with pytest.raises(UserError, match=rf"micro-batches of 2 on {world} ranks; .* 1, 2, 3, 4, 6, 12 ranks"):
            micro_batches(config, ranks(world))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (300, 300),
        ("300", 300),
        ("300steps", 300),
        ("1 step", 1),
        ("1e3steps", 1000),
        ("64samples", 8),
        ("65samples", 9),
        ("1sample", 1),
        ("1epoch", 13),
        ("2epochs", 25),
        ("0.5epochs", 7),
        ("1e2epochs", 1250),
        ("1.12epochs", 14),
        ("0", 0),
    ],
)
def test_durations_become_steps_rounded_up(text: str | int, steps: int) -> None:
    assert to_steps(text, "x", global_batch=8, epoch_samples=100) == steps


def test_durations_are_exact() -> None:
    assert to_steps("1.1epochs", "x", global_batch=10, epoch_samples=100) == 11  # 1.1 * 100 is 110.00000000000001
    assert parse_duration("1e6samples", "x") == (Fraction(10**6), "sample")


def test_ranges_of_steps() -> None:
    assert parse_range("20-30", "x") == (20, 30)
    assert parse_range("7-7", "x") == (7, 7)
    for text in ("30-20", "20", "0-3", "a-b", "1-2-3", "-3", "1 - 2"):
        with pytest.raises(UserError, match=re.escape(f"x={text!r} is not a range of steps")):
            parse_range(text, "x")
