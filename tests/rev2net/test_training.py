"""Whole trainings through the real parts: the deepspeed launcher, DALI, gloo, an MLflow store read back."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from tiny import BIN, ROOT, TINY, Trained, environment, run, spoil, wait

from dataloaders.errors import UserError
from rev2net import checkpoint
from rev2net.cli import main
from rev2net.config import load_config
from rev2net.data import open_data, open_target, train_loader
from rev2net.distributed import Ranks, computes_in_bf16
from rev2net.losses import TERMS
from rev2net.models import I3D
from rev2net.models.build import build_network
from rev2net.resume import hold
from rev2net.train import ASK_EVERY, start_from, train, without_imagenet


@pytest.fixture(scope="module")
def client(trained: Trained) -> MlflowClient:
    """The store that the training made by itself."""
    return MlflowClient(f"sqlite:///{trained.output.parent / 'mlflow.db'}")


def test_p11_one_run_for_two_ranks_with_all_terms_and_artifacts(trained: Trained, client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name("rev2net")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    found = runs[0]
    assert found.info.status == "FINISHED"
    assert found.data.params["train.global_batch"] == "8" and found.data.params["loss.alpha"] == "0.01"
    for term in TERMS:
        history = client.get_metric_history(found.info.run_id, term)
        assert [m.step for m in history] == [1, 2, 3, 4, 5, 6], term
        assert all(m.value == m.value and abs(m.value) < 1e4 for m in history)
    assert all(0 <= m.value <= 1 for m in client.get_metric_history(found.info.run_id, "train/top1"))
    wanted = {"lr", "clips_per_second", "data_wait_share", "step_seconds", "memory_gib"}
    assert wanted | {"train/top1", "val/top1", "val/top5"} <= found.data.metrics.keys()
    artifacts = {f.path for f in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "confusion_matrix.png", "decoders.png"} <= artifacts
    assert "version.torch" in found.data.tags


def test_log_line_holds_everything(trained: Trained) -> None:
    lines = re.findall(r"^step \d+/6 .*$", trained.stdout, re.MULTILINE)
    assert len(lines) == 6
    for word in (
        "ce",
        "ddp_high",
        "ddp_low",
        "flow",
        "frame",
        "total",
        "lr",
        "s/step",
        "wait",
        "clips/s",
        "GiB",
        "ETA",
    ):
        assert f" {word}" in lines[-1], lines[-1]
    assert "(100%)" in lines[-1]


def test_run_folder_holds_config_trace_and_whole_checkpoints(trained: Trained) -> None:
    train = yaml.safe_load((trained.output / "config.yaml").read_text())["train"]
    assert (train["zero_stage"], train["precision"]) == (1, "auto")
    computed = checkpoint.read_state(checkpoint.find(trained.output)).config["train"]["precision"]
    assert computed == ("bf16" if computes_in_bf16(torch.device("cpu")) else "fp32")
    assert json.loads((trained.output / "profile.trace.json").read_text())["traceEvents"]
    folder = trained.output / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000006"
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-00000003", "step-00000006"]
    buffers = load_file(folder / "step-00000006" / "buffers.safetensors")
    name = "encoder.Conv3d_1a_7x7.bn.running_mean"
    assert not torch.equal(*buffers[name])
    averaged = load_file(folder / "step-00000006" / "weights.safetensors")[name]
    torch.testing.assert_close(averaged, buffers[name].mean(0))


def test_same_command_again_does_nothing(
    trained: Trained, client: MlflowClient, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before = (trained.output / "checkpoints" / "step-00000006" / "state.json").stat().st_mtime_ns
    train_again = trained.command[trained.command.index("train") :]
    assert main(list(train_again)) == 0 and "is complete" in capsys.readouterr().out + caplog.text
    assert (trained.output / "checkpoints" / "step-00000006" / "state.json").stat().st_mtime_ns == before
    assert len(client.search_runs([client.get_experiment_by_name("rev2net").experiment_id])) == 1


def test_the_data_may_lie_behind_a_url(
    trained: Trained, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for number, data in enumerate((str(tiny_data), tiny_data.as_uri())):
        assert main(["eval", str(trained.output), data, "--views", "1x1", "--json", str(tmp_path / str(number))]) == 0
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    assert list((tmp_path / "home" / "rev2net").rglob("val-*.tar"))
    keys = [f"data.path={tiny_data.as_uri()}", f"loader.cache={tmp_path / 'cache'}", "loader.cache_gb=1"]
    open_data(load_config("configs/demo.yaml", keys)).shards("train")[0].fetch()
    assert list((tmp_path / "cache").rglob("train-*.tar"))


def test_p12_data_of_another_official_split_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_data / "dataset.json").read_text())
    official = {"lists": "ucf101", "split": 2}
    (tmp_path / "dataset.json").write_text(json.dumps(manifest | {"official": official}))
    keys = [f"data.path={tmp_path}"]
    assert open_data(load_config("configs/demo.yaml", [*keys, "data.split=2"])).official == official
    with pytest.raises(UserError, match=r"from the official split 2, and data\.split is 1: set data\.split=2, or data"):
        open_data(load_config("configs/demo.yaml", keys))
    adapted = load_config("configs/demo.yaml", [f"data.path={tiny_data}", f"target.path={tmp_path}"])
    with pytest.raises(UserError, match=r"set data\.split=2, or target\.path to the data of split 1"):
        open_target(adapted, tuple(manifest["classes"]))


def test_test_time_network_is_a_bare_i3d(trained: Trained) -> None:
    encoder, _, _ = checkpoint.load_encoder(checkpoint.find(trained.output))
    bare = I3D(8, width=0.25)
    assert type(encoder) is I3D and encoder.state_dict().keys() == bare.state_dict().keys()
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in bare.parameters())


def test_p2_eval_counts_every_video_once_on_any_number_of_ranks(
    trained: Trained, tiny_data: Path, tmp_path: Path
) -> None:
    base = ("eval", str(trained.output), str(tiny_data), "--views", "2x3")
    assert main([*base, "--json", str(tmp_path / "1.json"), "--scores", str(tmp_path / "1.jsonl")]) == 0
    # 8 videos on 3 ranks: the ranks have different numbers of videos.
    run(
        str(BIN / "torchrun"),
        "--standalone",
        "--nproc_per_node",
        "3",
        "-m",
        "rev2net",
        *base,
        "--json",
        str(tmp_path / "3.json"),
        "--scores",
        str(tmp_path / "3.jsonl"),
    )
    one, three = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "3.json"))
    assert one["videos"] == 8 and sum(map(sum, one["confusion"])) == 8
    assert one == three
    lines = (tmp_path / "1.jsonl").read_text()
    assert lines == (tmp_path / "3.jsonl").read_text()
    videos = [json.loads(line) for line in lines.splitlines()]
    assert sum(video["label"] == video["predicted"] for video in videos) == round(8 * one["top1"])
    assert [video["video"] for video in videos] == list(range(8)) and len({video["source"] for video in videos}) == 8
    assert all(video["predicted"] == one["classes"][int(np.argmax(video["scores"]))] for video in videos)


def test_p4_resume_is_bit_equal_and_stays_in_the_same_run(tiny_data: Path, other_data: Path, tmp_path: Path) -> None:
    """With a target domain: the discriminator and the factor of the reversal go on, too."""

    def configuration(name: str) -> list[str]:
        return [
            "configs/demo.yaml",
            *TINY,
            f"data.path={tiny_data}",
            f"target.path={other_data}",
            "target.decode=true",
            "target.hidden=32",
            f"output={tmp_path}/{name}",
            "train.duration=5steps",
            "train.keep_checkpoints=1",
            "train.log_every=2",
        ]

    whole, parts = (load_config(c[0], c[1:]) for c in (configuration("whole"), configuration("parts")))
    train(whole)
    asked = iter([False, False, True])
    stopped = train(parts, stop_requested=lambda: next(asked))
    assert (stopped.step, stopped.finished, stopped.metrics) == (3, False, {})
    finished = train(parts)
    assert finished.finished and finished.run_id == stopped.run_id
    (tmp_path / "parts" / "result.json").write_text("")  # of a disk that was full
    assert train(parts) == finished and json.loads((tmp_path / "parts" / "result.json").read_text())["step"] == 5
    client = MlflowClient(finished.tracking_uri)
    experiment = client.get_experiment_by_name("rev2net").experiment_id
    ids = {r.info.run_name: r.info.run_id for r in client.search_runs([experiment])}
    for term in TERMS:
        a, b = ([m.value for m in client.get_metric_history(ids[n], term)] for n in ("whole", "parts"))
        assert len(a) == 3 and a == b, term  # of step 4 a mean over what was before the end and after it
    last = [load_file(tmp_path / n / "checkpoints/step-00000005/weights.safetensors") for n in ("whole", "parts")]
    assert "discriminator.out.weight" in last[0]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    for name in ("whole", "parts"):  # both also saved step 3
        assert [path.name for path in checkpoint.checkpoints(tmp_path / name / "checkpoints")] == ["step-00000005"]


def test_the_augmentation_of_the_configuration_reaches_the_clips(tiny_data: Path) -> None:
    def rgb(*words: str) -> torch.Tensor:
        plain = [f"augment.{name}=0" for name in ("flip", "brightness", "contrast", "saturation", "hue")]
        keys = [*TINY, f"data.path={tiny_data}", "output=none", "loader.backend=pyav", "augment.scales=[1.0]"]
        config = load_config("configs/demo.yaml", [*keys, *plain, *words])
        ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        loader = train_loader(open_data(config), config, ranks, 0)
        found = next(loader).stream("rgb")
        loader.close()
        return found

    assert torch.equal(rgb("augment.flip=1"), rgb().flip(-1))
    for word in ("scales=[0.5]", "brightness=0.5", "contrast=0.5", "saturation=0.5", "hue=0.5"):
        assert not torch.equal(rgb(f"augment.{word}"), rgb()), word


@pytest.mark.parametrize("cases", ["some", pytest.param("all", marks=pytest.mark.chaos)])
def test_p4_p5_every_zero_stage_saves_restores_and_agrees(
    cases: str, tiny_data: Path, tmp_path: Path, record: Callable[[str, str, str], None]
) -> None:
    """Saved in the middle of an epoch, with augmentation on; what was not saved is trained again bit for bit."""
    worker = str(Path(__file__).with_name("zero_worker.py"))
    run(str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", worker, str(tiny_data), str(tmp_path), cases)
    results = json.loads((tmp_path / "cases.json").read_text())
    config = load_config("configs/demo.yaml", [*TINY, f"data.path={tiny_data}"])
    parameters = sum(parameter.numel() for parameter in build_network(config, 8).parameters())
    for case, result in results.items():
        assert result["after"] == result["again"], case
        # Two float32 numbers a parameter with AdamW, one with SGD; DeepSpeed's partitions are whole and aligned.
        state = (8 if "adamw" in case else 4) * parameters / (1 if case.startswith("zero0") else 2)
        assert len(result["held"]) == 2
        assert all(0.95 * state <= held <= 1.05 * state + 64 * 1024 for held in result["held"]), case
    # The stage moves memory around; it does not change the training: equal to rounding over the first step, one update
    # and one with momentum. (From there on this tiny network, whose last blocks normalise 16 numbers, multiplies a
    # difference of 1e-7 a thousandfold each step. Adam's first steps divide rounding errors by themselves, hence SGD.)
    for case in ("zero2-sgd-fp32", "zero3-sgd-fp32"):
        assert results[case]["before"] == pytest.approx(results["zero0-sgd-fp32"]["before"], rel=1e-5)
    record(
        f"a resume under {len(results)} combinations of ZeRO stage, optimizer and precision",
        "the losses after it are those of the run that went on, bit for bit",
        "no step",
    )


def test_p8_replaced_clips_are_counted_and_too_many_end_the_run(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    spoil(data, 2)
    words = [*TINY, f"data.path={data}", "train.micro_batch=8"]
    with pytest.raises(RuntimeError, match=r"clips cannot be decoded, more than loader\.max_bad=0\.01 allows"):
        train(load_config("configs/demo.yaml", [*words, f"output={tmp_path}/strict"]))
    config = load_config("configs/demo.yaml", [*words, f"output={tmp_path}/lenient", "loader.max_bad=0.5"])
    result = train(config)
    assert result.finished
    history = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, "replaced_clips")
    # Three epochs, in each of which both are met, and perhaps met again as a replacement.
    assert history[-1].value >= 6 and [m.value for m in history] == sorted(m.value for m in history)
    assert checkpoint.read_state(Path(result.checkpoint)).replaced == history[-1].value


def test_p9_a_step_without_a_finite_loss_is_skipped_and_three_in_a_row_end_the_run(
    tiny_data: Path, tmp_path: Path, record: Callable[[str, str, str], None]
) -> None:
    worker = str(Path(__file__).with_name("nonfinite_worker.py"))
    done = run(str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", worker, str(tiny_data), str(tmp_path))
    assert done.stdout.count("step 2 is skipped: its loss is not finite on rank 1 (clips ") == 3
    assert done.stdout.count("step 3 is skipped: its loss is finite, but its gradients are not") == 3
    stages = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert len(stages) == 3
    for stage in stages:
        # Step, loss reported, weights and statistics as before, all of them finite.
        skipped, done_ = (False, True, True), (True, False, True)
        expected = [done_, skipped, skipped, done_, skipped, skipped]
        assert stage["steps"] == [[number, *each] for number, each in enumerate(expected, start=1)]
        assert "3 steps in a row were skipped; of step 7: its loss is not finite on rank 1 (clips " in stage["message"]
        assert stage["saved"] == "step-00000004" and stage["whole"]
        assert stage["resumed"] == [4, 2, [2.0]]
        assert "step-00000004 (the checkpoint before it is None)" in stage["message"]
    assert [stage["evaluation"] for stage in stages] == [None, {"val/top1": 0.5}, None]
    record(
        "NaN in the clips of one rank, infinite gradients (ZeRO 0, 1, 3)",
        "the step is skipped on all ranks, of a loss rank and clips are named, weights and statistics stay; three in a "
        "row end the run, with the state before them saved",
        "the skipped steps",
    )


def test_p5_checkpoint_of_two_ranks_goes_on_on_one(trained: Trained, tiny_data: Path, tmp_path: Path) -> None:
    """Two ranks, then one with twice the accumulation: the loss of the next step agrees to 1e-5."""
    folder = tmp_path / "moved" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000003").symlink_to(trained.output / "checkpoints" / "step-00000003")
    config = load_config("configs/demo.yaml", [*TINY, f"data.path={tiny_data}", f"output={tmp_path}/moved"])
    losses = []
    for result in (json.loads((trained.output / "result.json").read_text()), asdict(train(config))):
        history = MlflowClient(result["tracking_uri"]).get_metric_history(result["run_id"], "loss/total")
        losses.append({m.step: m.value for m in history})
    assert losses[1].keys() == {4, 5, 6}, "the resumed training does not start at the checkpoint's step"
    for step, value in losses[1].items():
        assert value == pytest.approx(losses[0][step], rel=1e-5)


def test_init_from_replaces_the_head_only(trained: Trained, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    manifest = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(manifest | {"classes": [*manifest["classes"], "swim"]}))
    start = f"{trained.output}/checkpoints/latest"
    config = load_config(
        "configs/demo.yaml",
        [*TINY, f"data.path={data}", f"output={tmp_path}/ft", f"init_from={start}",
         "train.duration=1steps", "optim.lr=1e-12", "optim.weight_decay=0",
         "model.imagenet=a file that nobody needs then"],
    )  # fmt: skip
    result = train(config)
    said = (tmp_path / "ft" / "train.log").read_text()
    assert "penalty never acts: loss.ddp_low_from=2steps is not before the end, step 1" in said
    assert result.run_id is not None
    params = MlflowClient(result.tracking_uri).get_run(result.run_id).data.params
    assert params["init_from.run"] == json.loads((trained.output / "result.json").read_text())["run_id"]
    assert params["init_from.step"] == "6"
    source = checkpoint.read_tensors(checkpoint.find(trained.output), "weights")
    tuned = checkpoint.read_tensors(checkpoint.find(tmp_path / "ft"), "weights")
    network = build_network(without_imagenet(config), 9)
    start_from(network, start, tuple("abcdefghi"))
    head = {"encoder.logits.conv3d.weight", "encoder.logits.conv3d.bias"}
    for name, tensor in network.state_dict().items():
        if name in head:
            assert (len(tensor), len(tuned[name]), len(source[name])) == (9, 9, 8)
        elif name.startswith("encoder."):
            assert torch.equal(tensor, source[name]), name
            if name.endswith((".weight", ".bias")):  # statistics follow the clips of the step
                torch.testing.assert_close(tuned[name], source[name])
    fresh = "flow_output.flow.weight"
    assert not torch.allclose(tuned[fresh], source[fresh])
    classes = checkpoint.read_state(checkpoint.find(trained.output)).classes
    for known, taken_over in ((classes, True), (("swim", *classes[1:]), False)):  # as many, but others
        network = build_network(without_imagenet(config), 8)
        start_from(network, start, known)
        assert torch.equal(network.state_dict()[max(head)], source[max(head)]) == taken_over


def test_p7_ctrl_c_saves_and_the_same_command_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    """Meanwhile the folder is refused to another training; what changes before it goes on is told."""
    words = [*TINY, f"data.path={tiny_data}", f"output={tmp_path}/run", "model.name=i3d", "loss.ddp=none"]
    words += ["train.duration=5000steps", "train.checkpoint_every=5000steps", "train.log_every=1"]
    command = [sys.executable, "-m", "rev2net", "train", "configs/demo.yaml", *words]
    log = tmp_path / "run" / "train.log"
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        wait("two steps", lambda: log.exists() and "step 2/" in log.read_text())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="another training is at work in"):
            patch.setattr("rev2net.resume.PATIENCE_SECONDS", 0.5)
            train(load_config("configs/demo.yaml", words))
        process.send_signal(signal.SIGINT)
        assert "saving after the step in hand" in process.communicate(timeout=200)[1]
    assert process.returncode == 130
    (saved,) = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    step = checkpoint.read_state(saved).step
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("rev2net").experiment_id])
    assert found.info.status == "KILLED"
    stopped = train(load_config("configs/demo.yaml", [*words, "optim.lr=0.007"]), stop_requested=lambda: True)
    assert (stopped.step, stopped.run_id) == (step + 1, found.info.run_id)
    assert "settings have changed since that checkpoint, and count from here on: optim.lr=0.007" in log.read_text()


def test_an_output_folder_is_held_by_one_training_unless_its_machine_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    monkeypatch.setattr("rev2net.resume.PATIENCE_SECONDS", 0.1)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    output = tmp_path / "runs" / "mine"
    with ExitStack() as first:
        hold(output, alone, first)
        with ExitStack() as second, pytest.raises(UserError, match=rf"at work in output={output}: .*/train\.lock\)$"):
            hold(output, alone, second)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with ExitStack() as requeued:
            hold(output, alone, requeued)
            assert "which a start of this job has held: its machine has died, going on" in caplog.text
            (output / "config.yaml").touch()
    assert output.is_dir()
    (output / "config.yaml").unlink()
    with ExitStack() as again:
        hold(output, alone, again)
    assert not output.exists()  # a training that came to nothing


def test_p7_a_stop_does_not_wait_for_an_evaluation(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checkpoint is there: the next start does what was left, once."""
    words = [*TINY, f"data.path={tiny_data}", f"output={tmp_path}/run", "model.name=i3d", "loss.ddp=none"]
    words += ["train.duration=2steps", "train.eval_every=1steps", "eval.views=10x1", "eval.batch=1"]
    caplog.set_level("INFO")
    config = load_config("configs/demo.yaml", words)
    evaluation = [False] * (8 * 10 // ASK_EVERY)
    asked = iter([False, *evaluation[1:], True])
    results = [train(config, stop_requested=lambda: next(asked))]
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert checkpoint.read_evaluation(folder) is None and "begins it anew" in caplog.text
    assert "and nothing else" not in caplog.text
    results.append(train(config, stop_requested=lambda: True))
    assert checkpoint.read_evaluation(folder) is None and "and nothing else" in caplog.text
    asked = iter([*evaluation, False, True])
    results.append(train(config, stop_requested=lambda: next(asked)))
    assert checkpoint.read_evaluation(folder) is not None
    results.append(train(config))
    assert [(result.step, result.finished, bool(result.metrics)) for result in results] == [
        (1, False, False),
        (1, False, False),
        (2, False, False),
        (2, True, True),
    ]
    client = MlflowClient(results[-1].tracking_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("rev2net").experiment_id])
    assert [entry.step for entry in client.get_metric_history(found.info.run_id, "val/top1")] == [1, 2]


def test_compile_compiles_the_training_step(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as ever, and run as it is: the compiler of C++ that comes after would take minutes."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    words = [*TINY, f"data.path={tiny_data}", f"output={tmp_path}/run", "train.duration=1steps", "model.compile=true"]
    train(load_config("configs/demo.yaml", [*words, "model.name=i3d", "loss.ddp=none"]))
    convolutions = [node for graph in graphs for node in graph.graph.nodes if "conv3d" in str(node.target)]
    assert len(convolutions) >= 57  # an I3D's


def test_p12_user_mistakes_are_one_sentence(
    trained: Trained, tiny_data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    demo = ("train", "configs/demo.yaml", f"data.path={tiny_data}", f"output={tmp_path}/run", *TINY)
    assert "train.zero_stage" in refused(*demo, "train.zero_stge=2")
    assert "data.size" in refused(*demo, "data.size=50")
    assert "train.global_batch" in refused(*demo, "train.global_batch=10")
    assert "nowhere" in refused(*demo, "data.path=nowhere")
    assert "no configuration file" in refused("train", "configs/none.yaml")
    assert "another architecture" in refused(
        *demo, f"output={trained.output}", "train.duration=9steps", "model.width=0.5"
    )
    for changed in ("train.global_batch=16", "optim.name=sgd", "data.train_split=val"):
        said = refused(*demo, f"output={trained.output}", "train.duration=9steps", changed)
        assert "was trained with" in said and f"not {changed.split('=')[1]}: choose another output=" in said
    shutil.copytree(tiny_data, tmp_path / "other")
    with (tmp_path / "other" / "dataset.json").open("a") as manifest:
        manifest.write("\n")
    said = refused(*demo, f"output={trained.output}", "train.duration=9steps", f"data.path={tmp_path}/other")
    assert f"was trained on other clips than {tmp_path}/other holds now: choose another output=" in said
    assert "sync_bn" in refused(*demo, "model.sync_bn=true")
    assert "use stage 0, 1 or 2" in refused(*demo, "model.compile=true", "train.zero_stage=3")
    assert "checkpoint" in refused("eval", str(tmp_path), str(tiny_data))
    assert "--batch 0 is not possible" in refused("eval", str(trained.output), str(tiny_data), "--batch", "0")
    said = refused("eval", str(trained.output), str(tiny_data), "--confusion", "x.foo")
    assert "x.foo does not end in .png or" in said
    assert "x.csv does not end in .jsonl:" in refused("eval", str(trained.output), str(tiny_data), "--scores", "x.csv")
    for nowhere in (tmp_path / "a/b", tmp_path):
        assert "is a folder, or in none" in refused("eval", str(trained.output), str(tiny_data), "--json", str(nowhere))
    assert "set train.zero_stage" in refused(*demo, "train.deepspeed={zero_optimization: {stage: 2}}")
    assert "views 'many' are unknown" in refused("eval", str(trained.output), str(tiny_data), "--views", "many")
    assert "has no split 'test'" in refused("eval", str(trained.output), str(tiny_data), "--split", "test")
    assert not (tmp_path / "run").exists()


def test_p12_batch_that_ranks_cannot_divide_through_the_launcher(tiny_data: Path, tmp_path: Path) -> None:
    done = run(
        *("deepspeed", "--num_gpus", "2", "--module", "rev2net", "train", "configs/demo.yaml", *TINY),
        *(f"data.path={tiny_data}", f"output={tmp_path}/run", "train.global_batch=12"),
        expect=2,
    )
    assert "cannot be divided" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_p12_flow_decoder_without_flow_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    clips = tiny_data.parent / "clips"
    assert (
        main(
            ["prepare", "folder", str(clips), str(tmp_path / "d"), "--codec", "vp9", "--short-side", "128", "--no-flow"]
        )
        == 0
    )
    config = load_config("configs/demo.yaml", [*TINY, f"data.path={tmp_path}/d", f"output={tmp_path}/run"])
    with pytest.raises(UserError, match="without --no-flow"):
        train(config)
