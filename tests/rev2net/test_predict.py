"""Predicting videos, and exporting the network that does it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from tiny import BIN, ROOT, Trained, environment, run

from dataloaders.errors import DecodeError, UserError
from dataloaders.plan import Views
from dataloaders.shards import DataSet
from dataloaders.transcode import PrepareSettings
from dataloaders.video import VideoSource
from dataloaders.windows import windows
from rev2net import checkpoint, export
from rev2net.annotate import annotate
from rev2net.cli import main
from rev2net.config import Config, config_from_tree
from rev2net.data import eval_loader
from rev2net.distributed import read_ranks
from rev2net.evaluate import score
from rev2net.models.build import build_encoder
from rev2net.predict import Predictor, Scored

SETTINGS = PrepareSettings(codec="vp9", fps=Fraction(10), short_side=128)


def stored_videos(data: DataSet, folder: Path) -> dict[int, Path]:
    """The RGB videos of the split `val`, as files, by sample index."""
    videos, number = {}, 0
    for shard in data.shards("val"):
        with shard.open() as reader:
            for i in range(len(reader)):
                videos[number] = folder / f"{reader.key(i)}.mp4"
                videos[number].write_bytes(reader.read(i)["mp4"])
                number += 1
    return videos


def pyav(config: Config) -> Config:
    return config.model_copy(update={"loader": config.loader.model_copy(update={"backend": "pyav"})})


@pytest.mark.parametrize(("views", "precision"), [("1x1", "fp32"), ("3x3", "fp32"), ("whole", "fp32"), ("1x1", "bf16")])
def test_a_short_video_is_scored_as_in_the_evaluation(
    trained: Trained, tiny_data: Path, tmp_path: Path, views: str, precision: str
) -> None:
    network, config, _ = checkpoint.load_encoder(checkpoint.find(trained.output))
    data, ranks = DataSet.open(tiny_data), read_ranks()
    loader = eval_loader(data, "val", pyav(config), ranks, views)
    samples, expected, _ = score(network, loader, device=ranks.device, precision=precision).means()
    loader.close()
    videos = stored_videos(data, tmp_path)
    assert len(videos) == len(samples) > 4
    predictor = Predictor.open(str(trained.output), views, batch=2, precision=precision)
    for sample, row in zip(samples.tolist(), expected, strict=True):
        with VideoSource(videos[sample]) as source:
            settings = PrepareSettings.from_json(data.preparation)
            (window,) = windows(source, settings, key="clip", seconds=60, every=60)
        np.testing.assert_allclose(predictor.score(window).scores.numpy(), row, atol=1e-5)


def test_flow_is_estimated_where_the_network_sees_it(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the source videos, some frames at a time: what is left of a difference is the stored flow's encoding."""
    monkeypatch.setattr("dataloaders.windows._CHUNK", 4)
    data, ranks = DataSet.open(tiny_data), read_ranks()
    config = config_from_tree(
        {
            "output": "none",
            "data": {"path": str(tiny_data), "frames": 8, "size": 64},
            "model": {"name": "i3d", "input": "flow"},
            "loss": {"ddp": "none"},
        }
    )
    loader = eval_loader(data, "val", pyav(config), ranks, "1x1")
    stored = {int(batch.sample[i]): batch.stream("flow")[i] for batch in loader for i in range(len(batch))}
    loader.close()
    settings = PrepareSettings.from_json(data.preparation)
    with data.shards("val")[0].open() as reader:
        sources = [json.loads(reader.read(i)["json"])["source"] for i in range(3)]
    for sample, name in enumerate(sources):
        with VideoSource(tiny_data.parent / "clips" / name) as source:
            (window,) = windows(source, settings, key="clip", seconds=60, every=60)
        shape = export.Description.of(config, state_of(data)).shape
        (clips,) = window.clips(shape, Views.parse("1x1"), "flow", batch=8, device=ranks.device)
        assert clips.shape == (1, 2, 8, 64, 64)
        difference, size = (float(flow.abs().mean()) for flow in (clips[0] - stored[sample], stored[sample]))
        assert difference < 0.1 * size


def state_of(data: DataSet) -> checkpoint.RunState:
    return checkpoint.RunState(
        step=7, run_id=None, classes=data.classes, world_size=1, config={}, preparation=data.preparation, updates=7
    )


class Numbered:
    """Stands in for a VideoSource: frames whose pixels are their number, damaged after `good` of them."""

    width = height = 128
    fps = Fraction(10)

    def __init__(self, count: int, good: int | None = None) -> None:
        self.count, self.good = count, good

    def frames(self, width: int, height: int, fps: Fraction | None) -> Iterator[Any]:
        for number in range(self.count):
            if number == self.good:
                raise DecodeError("video.mp4", "is broken")
            yield np.full((height * 3 // 2, width), number, np.uint8)


def pieces(source: Numbered, seconds: float, every: float, into: list[tuple[int, int]]) -> None:
    for window in windows(source, SETTINGS, key="v", seconds=seconds, every=every):  # type: ignore[arg-type]
        numbers = [int(picture[0, 0]) for picture in window.pictures]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert (window.start, window.end) == (numbers[0] / 10, (numbers[-1] + 1) / 10)
        assert window.info.num_frames == len(numbers)
        into.append((numbers[0], numbers[-1] + 1))


@pytest.mark.parametrize(
    ("frames", "seconds", "every", "expected"),
    [
        (1, 1, 1, [(0, 1)]),
        (9, 1, 1, [(0, 9)]),
        (10, 1, 1, [(0, 10)]),
        (20, 1, 1, [(0, 10), (10, 20)]),
        (23, 1, 1, [(0, 10), (10, 20), (13, 23)]),
        (20, 1, 0.5, [(0, 10), (5, 15), (10, 20)]),
        (22, 1, 0.5, [(0, 10), (5, 15), (10, 20), (12, 22)]),
        (20, 0.5, 1, [(0, 5), (10, 15)]),
        (23, 0.5, 1, [(0, 5), (10, 15), (18, 23)]),
    ],
)
def test_windows_hold_all_of_a_video(
    frames: int, seconds: float, every: float, expected: list[tuple[int, int]]
) -> None:
    found: list[tuple[int, int]] = []
    pieces(Numbered(frames), seconds, every, found)
    assert found == expected


def test_what_stands_before_damage_is_given() -> None:
    found: list[tuple[int, int]] = []
    with pytest.raises(DecodeError, match="is broken"):
        pieces(Numbered(40, good=14), 1, 1, found)
    assert found == [(0, 10), (4, 14)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos: good, audio alone, no frames, text, cut off with its index at the end and at the front."""
    folder = tmp_path_factory.mktemp("videos")
    encode(folder / "good.mp4", 60)
    whole = encode(folder / "whole.mp4", 120).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    faststart = encode(folder / "faststart.mp4", 120, options={"movflags": "faststart"}).read_bytes()
    (folder / "half.mp4").write_bytes(faststart[: len(faststart) * 2 // 3])
    with av.open(str(folder / "audio.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with av.open(str(folder / "empty.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    (folder / "text.mp4").write_text("no video\n" * 100)
    os.mkfifo(folder / "pipe.mp4")
    return folder


def encode(path: Path, frames: int, size: int = 128, options: dict[str, str] | None = None) -> Path:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(base, number, 1), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_files_that_are_no_videos_are_named_and_the_others_predicted(
    trained: Trained, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "audio.m4a": "holds no video stream",
        "empty.mkv": "",
        "text.mp4": "it is no video, or was cut off",
        "cut.mp4": "it is no video, or was cut off",
        "gone.mp4": "there is no such file",
        f"{'long' * 70}.mp4": "File name too long",
        "pipe.mp4": "it is no plain file",
        ".": "it is a folder",
    }
    videos = [str(clips / name) for name in (*wrong, "half.mp4", "good.mp4")]
    words = ("--json", "--top", "2", "--annotate", str(tmp_path))
    assert main(["predict", str(trained.output), *videos, *words]) == 2
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert [entry["video"] for entry in told] == [str(Path(video)) for video in videos]
    assert "Traceback" not in err
    for entry, reason in zip(told, wrong.values(), strict=False):
        assert reason in entry["error"] and "windows" not in entry
        assert f"rev2net predict: {entry['error']}\n" in err
    half, good = told[-2:]
    assert 1.5 < half["end"] < 4 and len(half["windows"]) == 1
    assert "error" not in good
    assert (good["start"], good["end"]) == (0, 2.4)
    assert len(good["top"]) == 2
    assert good["top"][0]["score"] >= good["top"][1]["score"] > 0
    # Damage ends a copy where it is, and what comes after it is copied all the same.
    frames = {path.name: len(list(decoded(path))) for path in tmp_path.iterdir()}
    assert frames.keys() == {"half.mp4", "good.mp4"} and 25 < frames["half.mp4"] < 100


def test_a_copy_that_the_encoder_refuses_and_odd_names_stop_nothing(
    trained: Trained, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, odd = tmp_path / "wide.mkv", tmp_path / os.fsdecode(b"caf\xe9.mp4")  # in Latin-1
    with av.open(str(wide), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16386, 16, "yuv420p"  # H.264 ends at 16384
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame(16386, 16, "yuv420p")))
        container.mux(stream.encode(None))
    odd.write_bytes((clips / "good.mp4").read_bytes())
    words = [str(wide), str(odd), "--annotate", str(tmp_path / "out"), "--views", "1x1"]
    assert main(["predict", str(trained.output), *words]) == 2
    out, err = capsys.readouterr()
    assert f"rev2net predict: {tmp_path}/out/wide.mp4 cannot be written (" in err
    assert [line for line in out.splitlines() if line.startswith("/")] == [str(wide), f"{tmp_path}/caf\\udce9.mp4"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [odd.name]


def test_long_videos_are_told_in_windows_and_copied_with_them(
    trained: Trained, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copies"
    command = ["predict", str(trained.output), str(clips / "whole.mp4"), "--window", "2", "--annotate", str(out)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(clips / "whole.mp4")
    assert [line.split("s ")[0].split() for line in lines[1:4]] == [
        ["0.0", "-", "2.0"],
        ["2.0", "-", "4.0"],
        ["2.8", "-", "4.8"],
    ]
    assert lines[4].endswith("(mean of the windows)")
    frames = [list(decoded(path)) for path in (clips / "whole.mp4", out / "whole.mp4")]
    assert len(frames[0]) == len(frames[1]) == 120
    for before, after in zip(*frames, strict=True):
        difference = np.abs(before.astype(int) - after)
        assert difference[:10, :40].mean() > 30 > 3 * difference[64:].mean()
    assert main(command) == 2  # it does not replace a file
    assert "whole.mp4 is there: give --overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["whole.mp4"]
    (out / "whole.mp4").write_bytes(b"old")
    assert main([*command, "--overwrite", "--views", "1x1"]) == 0
    assert len(list(decoded(out / "whole.mp4"))) == 120


def test_a_copy_shows_each_window_s_own_classes(clips: Path, tmp_path: Path) -> None:
    scores = torch.eye(2, dtype=torch.float64)
    told = [Scored(0.0, 2.0, scores[0]), Scored(2.0, 4.8, scores[1])]
    copies = [tmp_path / f"{name}.mp4" for name in ("first", "second", "both")]
    for copy, windows_of_it in zip(copies, ([told[0]], [replace(told[1], start=0.0)], told), strict=True):
        annotate(clips / "whole.mp4", copy, windows_of_it, ["iiii", "MMMMMMMM"])
    first, second, both = (np.stack([frame[:24, :64] for frame in decoded(copy)]).astype(int) for copy in copies)
    with av.open(str(copies[0])) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (6, 1)  # BT.601, limited: as its pictures are
    boundary = 50  # of 25 frames a second
    near, far = (np.abs(both - other).mean(axis=(1, 2)) for other in (first, second))
    assert (near[:boundary] < far[:boundary]).all() and (near[boundary:] > far[boundary:]).all()


def test_scores_that_are_not_finite_are_no_prediction(trained: Trained, clips: Path, tmp_path: Path) -> None:
    predictor = Predictor.open(str(trained.output), "1x1", 1)
    predictor.scorer = lambda clip: torch.full((len(clip), 8), torch.nan)
    with VideoSource(clips / "whole.mp4", threads=1) as source:
        window = next(windows(source, SETTINGS, key="a", seconds=1e18, every=1e18))
        with pytest.raises(UserError, match="scores are not finite"):
            predictor.score(window)
    assert window.end == pytest.approx(4.8, abs=0.15)  # the whole of it, at the data set's rate


def decoded(path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="gray")


_PEAK = """
import sys
from rev2net.cli import main
status = main(sys.argv[1:])
# Not ru_maxrss: that also counts what the parent held before this program was started in its place.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def test_memory_does_not_grow_with_the_video(trained: Trained, tmp_path: Path) -> None:
    def peak(frames: int) -> int:
        video = encode(tmp_path / f"{frames}.mp4", frames, size=144)
        words = ("predict", str(trained.output), str(video), "--window", "2", "--views", "1x1")
        return int(run(sys.executable, "-c", _PEAK, *words).stdout.splitlines()[-1])

    # 5,000 stored frames are 120 MB.
    assert peak(5100) - peak(100) < 40_000, "kB"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--window", "inf"), "--window inf is not possible"),
        (("--window", "0"), "--window 0 is not possible"),
        (("--views", "10x2"), "views '10x2' are unknown"),
        (("--top", "0"), "--top 0 is not possible"),
    ],
)
def test_impossible_words_are_one_sentence(
    trained: Trained, clips: Path, words: tuple[str, ...], reason: str, refused: Callable[..., str]
) -> None:
    assert reason in refused("predict", str(trained.output), str(clips / "good.mp4"), *words)


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained network in both formats."""
    folder = tmp_path_factory.mktemp("exported")
    files = {kind: folder / f"tiny.{kind}" for kind in ("pt2", "onnx")}
    for file in files.values():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["export", str(trained.output), str(file)]) == 0
        assert "equal to the checkpoint's" in said.getvalue()
    assert {path.name for path in folder.iterdir()} == {"tiny.pt2", "tiny.onnx"}
    return files


_ALONE = {
    "pt2": """
program = torch.export.load(sys.argv[1], extra_files=(extra := {"rev2net.json": ""}))
network, about = program.module(), json.loads(extra["rev2net.json"])
logits = [network(torch.from_numpy(clip)).detach().numpy() for clip in clips]
numbers = sum(p.numel() for p in program.state_dict.values() if p.dtype.is_floating_point)
""",
    "onnx": """
session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["rev2net.json"])
logits = [session.run(None, {session.get_inputs()[0].name: clip})[0] for clip in clips]
numbers = 0
""",
}
_FRAME = """
import json, sys
sys.path = [p for p in sys.path if p not in ("", {root!r})]
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in {refused!r}, name
sys.meta_path.insert(0, Refuse())
import numpy as np
{imports}
clips = list(np.load(sys.argv[2]).values())
{body}
np.savez(sys.argv[3], *logits)
print(json.dumps({{"about": about, "numbers": numbers}}))
"""


@pytest.mark.parametrize(("kind", "imports"), [("pt2", "import torch"), ("onnx", "import onnxruntime")])
def test_an_exported_network_runs_alone(
    trained: Trained, tiny_data: Path, exported: dict[str, Path], tmp_path: Path, kind: str, imports: str
) -> None:
    refused = {"rev2net", "dataloaders", "cluster", "deepspeed", "nvidia.dali", "av", "mlflow"}
    refused |= {"torch", "onnx"} if kind == "onnx" else set()
    rng = np.random.default_rng(0)
    given = [rng.uniform(-1, 1, (n, 3, 8, 64, 64)).astype(np.float32) for n in (1, 2, 5)]
    np.savez(tmp_path / "clips.npz", *given)
    script = _FRAME.format(root=str(ROOT), refused=refused, imports=imports, body=_ALONE[kind])
    words = [str(exported[kind]), str(tmp_path / "clips.npz"), str(tmp_path / "logits.npz")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    network, _, state = checkpoint.load_encoder(checkpoint.find(trained.output))
    for clip, logits in zip(given, np.load(tmp_path / "logits.npz").values(), strict=True):
        with torch.no_grad():
            expected = network(torch.from_numpy(clip)).numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    if kind == "pt2":
        # All the encoder's numbers and no others: neither decoders nor latents.
        assert told["numbers"] == sum(p.numel() for p in network.state_dict().values() if p.dtype.is_floating_point)
    assert told["about"]["classes"] == list(state.classes) == list(DataSet.open(tiny_data).classes)
    assert told["about"]["preparation"] == DataSet.open(tiny_data).preparation
    shape = {name: told["about"][name] for name in ("input", "frames", "size", "stride", "segments")}
    assert shape == {"input": "rgb", "frames": 8, "size": 64, "stride": 1, "segments": 0}
    assert "from 0 to 255 divided by 127.5, less 1" in told["about"]["preprocessing"]


def test_a_file_that_gives_other_logits_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path) -> tuple[export.Scorer, export.Description]:
        scorer, description = export._read_pt2(path)
        return lambda clip: scorer(clip) + 1e-3, description

    monkeypatch.setitem(export._FORMATS, ".pt2", (export._write_pt2, read))
    assert main(["export", str(trained.output), str(tmp_path / "network.pt2")]) == 1
    assert "gives other logits, by 1.0e-03 for 1 clips: nothing is written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_who_reads_no_further_ends_a_prediction_without_a_word(trained: Trained, clips: Path) -> None:
    command = [str(BIN / "rev2net"), "predict", str(trained.output), "--json", str(clips / "good.mp4")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert not any("Errno" in line or "Traceback" in line for line in process.stderr)
    assert process.wait(60) == 1


def test_an_exported_network_predicts_as_its_checkpoint(
    trained: Trained, exported: dict[str, Path], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(network: Path) -> dict[str, float]:
        capsys.readouterr()
        assert main(["predict", str(network), str(clips / "good.mp4"), "--json", "--top", "100"]) == 0
        entry = json.loads(capsys.readouterr().out)
        return {top["class"]: top["score"] for top in entry["top"]}

    expected = scores(trained.output)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
    for file in exported.values():
        assert scores(file) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match=r"--precision bf16 needs a checkpoint: .*tiny\.onnx computes in fp32"):
        Predictor.open(str(exported["onnx"]), None, 4, "bf16")


class Payload:
    """Unpickled, it makes the file `done`."""

    def __init__(self, done: Path) -> None:
        self.done = done

    def __reduce__(self) -> Any:
        return (Path.touch, (self.done,))


def rewritten(source: Path, target: Path, change: Any) -> None:
    """A copy of a zip file with `change(name, data)` for each of its entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.mark.parametrize("place", ["weight", "input"])
def test_pickles_in_a_pt2_file_are_refused(exported: dict[str, Path], tmp_path: Path, place: str) -> None:
    done, evil = tmp_path / "done", tmp_path / "evil.pt2"
    payload = io.BytesIO()
    torch.save(Payload(done), payload)

    def change(name: str, data: bytes) -> bytes:
        if place == "weight" and name.endswith("weights_config.json"):
            tree = json.loads(data)
            next(iter(tree["config"].values()))["use_pickle"] = True
            return json.dumps(tree).encode()
        evil_here = name.endswith("/weight_0") if place == "weight" else "/sample_inputs/" in name
        return payload.getvalue() if evil_here else data

    rewritten(exported["pt2"], evil, change)
    with pytest.raises(UserError, match=r"evil.pt2.*export it again"):
        export.read_exported(evil)
    assert not done.exists()
    # Whatever PyTorch says of it, it has unpickled it by then.
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(evil)
    assert done.exists()


@pytest.mark.parametrize("name", ["text.pt2", "text.onnx", "gone.pt2"])
def test_other_files_are_refused(clips: Path, tmp_path: Path, name: str) -> None:
    if name.startswith("text"):
        (tmp_path / name).write_text("no network")
    with pytest.raises(UserError):
        export.read_exported(tmp_path / name)


def test_a_description_that_was_tampered_with_is_refused(trained: Trained) -> None:
    _, config, state = checkpoint.load_encoder(checkpoint.find(trained.output))
    tree = export.Description.of(config, state).model_dump()
    shapes = ["batch", 3, 8, 64, 64], ["batch", 8]
    assert export.Description.read(json.dumps(tree), "file", *shapes) == export.Description.of(config, state)
    large = {**tree["preparation"], "short_side": 16_000_000}
    of_others: list[dict[str, object]] = [
        {"classes": []}, {"views": "all"}, {"size": 10**9}, {"preparation": {}}, {"more": 1}, {"segments": 3},
        {"classes": tree["classes"][1:]}, {"size": 32}, {"input": "flow"}, {"views": f"{'9' * 5000}x1"},
        {"preparation": large},
    ]  # fmt: skip
    for change in of_others:
        with pytest.raises(UserError, match="damaged") as refused:
            export.Description.read(json.dumps({**tree, **change}), "file", *shapes)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize(("name", "model"), [("actionflownet", {"width": 0.25}), ("tsm", {"backbone": "resnet18"})])
def test_other_networks_become_onnx(tiny_data: Path, tmp_path: Path, name: str, model: dict[str, Any]) -> None:
    tree = {
        "output": "runs/some",
        "data": {"path": str(tiny_data), "frames": 8, "size": 64, "segments": 4 if name == "tsm" else 0},
        "model": {"name": name, "input": "flow" if name == "tsm" else "rgb", **model},
        "loss": {"ddp": "none"},
    }
    config = config_from_tree(tree)
    torch.manual_seed(0)
    state = state_of(DataSet.open(tiny_data))
    network = build_encoder(config, len(state.classes)).eval()
    description = export.Description.of(config, state)
    file = tmp_path / "network.onnx"
    export._write_onnx(network, description, file)
    assert export._check(network, *export._read_onnx(file)) <= 1e-4
