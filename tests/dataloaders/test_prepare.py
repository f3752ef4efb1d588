from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from clips import contents, moving, write_video

from dataloaders.errors import UserError
from dataloaders.flow import decode_flow, tvl1
from dataloaders.prepare import prepare, prepare_share
from dataloaders.prepare_cli import add_prepare_arguments, run_prepare
from dataloaders.shards import DataSet, SampleInfo, ShardReader
from dataloaders.sources import SourceClip, SourceListing, read_folder, read_lists, shuffled
from dataloaders.transcode import PrepareSettings, area_average, transcode
from dataloaders.verify import verify
from dataloaders.video import Codec, VideoSource, decode_luma, gray, stored_size
from rev2net.cli import main

SMALL = PrepareSettings(short_side=64)
NO_FLOW = PrepareSettings(short_side=64, flow_scale=None)


def make_source(root: Path, classes: Sequence[str] = ("jump", "run"), clips: int = 3, frames: int = 6) -> Path:
    for c, name in enumerate(classes):
        for i in range(clips):
            pictures = moving(frames, 64, 80, step=2 * c + 1, seed=10 * c + i)
            write_video(root / name / f"{name} {i}.mp4", pictures)
    return root


def samples_of(data: DataSet, split: str) -> dict[str, tuple[SampleInfo, dict[str, bytes]]]:
    found = {}
    for shard in data.shards(split):
        with ShardReader(shard.path) as reader:
            assert len(reader) == shard.samples
            for i in range(len(reader)):
                parts = reader.read(i)
                info = SampleInfo.from_json(reader.key(i), parts["json"])
                found[info.source] = (info, parts)
    return found


def command(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="rev2net prepare")
    add_prepare_arguments(parser)
    return run_prepare(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_folder_per_class_becomes_a_data_set(tmp_path: Path, codec: Codec) -> None:
    source = make_source(tmp_path / "in")
    settings = PrepareSettings(short_side=64, codec=codec)
    report = prepare(read_folder(source, val_fraction=0.3), tmp_path / "out", settings)
    assert report.finished and not report.already and report.quarantined == ()
    assert report.prepared == {"train": 4, "val": 2}
    data = DataSet.open(tmp_path / "out")
    assert data.classes == ("jump", "run") and data.splits == ("train", "val")
    assert data.codec == codec and data.flow_scale == 0.5
    assert sorted(p.name for p in data.folder.iterdir()) == [
        "dataset.json",
        "train-000000.idx",
        "train-000000.tar",
        "val-000000.idx",
        "val-000000.tar",
    ]
    least = 128 if codec == "vp9" else 64
    for split in data.splits:
        samples = samples_of(data, split)
        assert Counter(info.label for info, _ in samples.values()) == dict.fromkeys((0, 1), 4 // (1 + 1)) or split
        for source_name, (info, parts) in samples.items():
            assert data.classes[info.label] == info.class_name == source_name.split("/")[0]
            assert (info.num_frames, info.fps, info.height) == (6, 25.0, least)
            assert (info.flow_height, info.flow_width) == (least // 2, {64: 48, 128: 128}[least])
            assert {name: len(list(decode_luma(parts[name], "k"))) for name in ("mp4", "flow.mp4")} == {
                "mp4": 6,
                "flow.mp4": 6,
            }
    assert verify(data.folder, deep=True) == []


def test_the_stored_flow_is_the_motion_in_pixels_of_the_stored_video(tmp_path: Path) -> None:
    # 3 pixels a frame of the source, which is stored at half its size: 1.5 pixels.
    source = write_video(tmp_path / "s.mp4", moving(6, 128, 192, step=3))
    clip = SourceClip(path=source, relative="s.mp4", split="train", label=0, class_name="c")
    for scale in (0.5, 1.0):
        parts = transcode(clip, PrepareSettings(short_side=64, flow_scale=scale))
        flow = decode_flow(np.stack(list(decode_luma(parts["flow.mp4"], "s"))))
        assert flow.shape == (6, 2, int(64 * scale), int(96 * scale))
        inner = flow[:, :, 8:-8, 12:-12]
        assert abs(float(np.median(inner[:, 0])) - 1.5) < 0.1
        assert abs(float(np.median(inner[:, 1]))) < 0.02
        assert float(np.abs(flow[5] - flow[4]).mean()) < 0.05


def test_a_clip_of_one_frame_has_zero_flow(tmp_path: Path) -> None:
    source = write_video(tmp_path / "s.mp4", moving(1))
    clip = SourceClip(path=source, relative="s.mp4", split="train", label=0, class_name="c")
    parts = transcode(clip, SMALL)
    assert [plane.tolist() for plane in decode_luma(parts["flow.mp4"], "s")] == [[[128] * 48] * 64]


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_stored_flow_of_a_real_clip_is_within_a_tenth_of_a_pixel(shared_videos: Path, codec: Codec) -> None:
    file = shared_videos / "hmdb51/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi"
    clip = SourceClip(path=file, relative=file.name, split="train", label=0, class_name="wave")
    settings = PrepareSettings(short_side=128, codec=codec)
    parts = transcode(clip, settings)
    info = SampleInfo.from_json(clip.key, parts["json"])
    with VideoSource(file) as source:
        size = stored_size(source.width, source.height, codec=codec, short_side=128, size=None)
        frames = np.stack([gray(picture) for picture in source.frames(*size, Fraction(25))])
    exact = np.clip(tvl1(frames), -20, 20)
    stored = decode_flow(np.stack(list(decode_luma(parts["flow.mp4"], "k"))))[: len(exact)]
    assert info.flow_height is not None and info.flow_width is not None
    rows, columns = enlarge(info.height, info.flow_height), enlarge(info.width, info.flow_width)
    error = np.linalg.norm(rows @ stored @ columns.T - exact, axis=1).mean()
    assert error <= 0.10
    assert len(parts["flow.mp4"]) <= len(parts["mp4"])


def enlarge(length: int, shorter: int) -> npt.NDArray[np.float64]:
    """Bilinear weights [length, shorter], pixel centres at half integers."""
    at = np.clip((np.arange(length) + 0.5) * shorter / length - 0.5, 0, shorter - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(shorter)))


def test_shrinking_averages_what_an_output_pixel_covers() -> None:
    line = np.array([[0, 2, 4, 9]], np.float32)
    assert area_average(line, 2, 1).tolist() == [[1.0, 6.5]]
    assert np.allclose(area_average(line[:, :3], 2, 1), [[2 / 3, 10 / 3]])
    field = np.random.default_rng(0).normal(size=(2, 336, 5)).astype(np.float32)
    small = area_average(field, 176, 1)
    assert small.shape == (2, 176, 5) and small.dtype == np.float32
    assert np.allclose(small.mean(1), field.mean(1), atol=1e-5)
    assert area_average(field, 336, 1) is field


def test_lists_with_splits_names_and_spaces(tmp_path: Path) -> None:
    make_source(tmp_path / "in")
    (tmp_path / "train.txt").write_text("# all\njump/jump 0.mp4 jump\n\nrun/run 0.mp4\trun\nrun/run 1.mp4 run\n")
    (tmp_path / "val.txt").write_text("jump/jump 2.mp4 jump\n")
    root = tmp_path / "in"
    assert command("list", tmp_path / "train.txt", tmp_path / "a", "--val", tmp_path / "val.txt", "--root", root,
                   "--short-side", 64, "--no-flow", "--workers", 1) == 0  # fmt: skip
    assert command("list", tmp_path, tmp_path / "b", "--root", root, "--short-side", 64, "--no-flow",
                   "--workers", 1) == 0  # fmt: skip
    data = DataSet.open(tmp_path / "a")
    assert (data.classes, data.num_samples("train"), data.num_samples("val")) == (("jump", "run"), 3, 1)
    assert not data.has_flow
    assert {s: i.label for s, (i, _) in samples_of(data, "train").items()} == {
        "jump/jump 0.mp4": 0,
        "run/run 0.mp4": 1,
        "run/run 1.mp4": 1,
    }
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_integer_labels_and_a_classes_file(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a.mp4 2\nb.mp4 0\n")
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").touch()
    lists = [("train", tmp_path / "l.txt")]
    assert read_lists(lists, tmp_path).classes == ("0", "1", "2")
    listing = read_lists(lists, tmp_path, classes_file=tmp_path / "names.txt")
    assert [clip.class_name for clip in listing.clips] == ["z", "x"]


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("train/a/1.mp4", "train/b/1.avi", "val/a/2.webm", "val/a/notes.txt", "val/a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listing = read_folder(tmp_path)
    assert [(c.split, c.class_name, c.relative) for c in listing.clips] == [
        ("train", "a", "train/a/1.mp4"),
        ("train", "b", "train/b/1.avi"),
        ("val", "a", "val/a/2.webm"),
    ]
    assert listing.skipped == ("val/a/notes.txt",)


def many_clips(classes: int, each: int) -> list[SourceClip]:
    return [
        SourceClip(path=Path("x"), relative=f"{c}/{i}.mp4", split="train", label=c, class_name=str(c))
        for c in range(classes)
        for i in range(each)
    ]


def test_the_validation_share_is_stratified_and_keyed_by_the_path(tmp_path: Path) -> None:
    for clip in many_clips(4, 10):
        (tmp_path / "all" / clip.relative).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / clip.relative).touch()
    val = {c.relative for c in read_folder(tmp_path / "all").clips if c.split == "val"}
    assert Counter(name.split("/")[0] for name in val) == dict.fromkeys("0123", 2)
    other = {c.relative for c in read_folder(tmp_path / "all", seed=1).clips if c.split == "val"}
    assert val != other
    (tmp_path / "all").rename(tmp_path / "moved")
    assert {c.relative for c in read_folder(tmp_path / "moved").clips if c.split == "val"} == val


@pytest.mark.parametrize(("classes", "each", "shard"), [(101, 95, 300), (8, 24, 20), (400, 20, 1000)])
def test_no_shard_of_a_class_sorted_list_has_twice_a_class_s_share(classes: int, each: int, shard: int) -> None:
    clips = many_clips(classes, each)
    for seed in range(3):
        order = shuffled(clips, seed)
        assert sorted(c.relative for c in order) == sorted(c.relative for c in clips)
        for start in range(0, len(order), shard):
            part = order[start : start + shard]
            expected = len(part) / classes
            if expected >= 1:
                assert max(Counter(c.label for c in part).values()) <= 2 * expected
    assert [c.relative for c in order] != [c.relative for c in shuffled(clips, 0)]


def test_any_class_can_follow_any_other() -> None:
    labels = [clip.label for clip in shuffled(many_clips(4, 200), 0)]
    assert len(set(pairwise(labels))) == 16


def test_the_order_of_the_listing_does_not_change_the_shards(tmp_path: Path) -> None:
    listing = read_folder(make_source(tmp_path / "in"), val_fraction=0)
    clips = list(listing.clips)
    random.Random(0).shuffle(clips)
    other = SourceListing(classes=listing.classes, clips=tuple(clips))
    prepare(listing, tmp_path / "a", NO_FLOW)
    prepare(other, tmp_path / "b", NO_FLOW)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_are_cut_by_size_and_mixed(tmp_path: Path) -> None:
    listing = read_folder(make_source(tmp_path / "in", clips=6), val_fraction=0)
    settings = PrepareSettings(short_side=64, flow_scale=None, shard_bytes=15_000)
    prepare(listing, tmp_path / "out", settings)
    data = DataSet.open(tmp_path / "out")
    assert len(data.shards("train")) >= 3 and data.num_samples("train") == 12
    assert len(samples_of(data, "train")) == 12
    for shard in data.shards("train"):
        with ShardReader(shard.path) as reader:
            names = Counter(reader.key(i).split("_")[0] for i in range(len(reader)))
        assert max(names.values()) <= shard.samples / 2 + 1


def test_processes_make_the_same_bytes_and_a_second_run_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in")
    assert command("folder", source, tmp_path / "a", "--short-side", 64, "--workers", 1) == 0
    assert command("folder", source, tmp_path / "b", "--short-side", 64, "--workers", 2) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()}
    capsys.readouterr()
    assert command("folder", source, tmp_path / "a", "--short-side", 64) == 0
    assert "nothing to do: 6 clips (train 4, val 2)" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()} == times


def test_p12_another_configuration_in_the_folder_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in")
    out = tmp_path / "out"
    prepare(read_folder(source), out, NO_FLOW)
    before = contents(out)
    with pytest.raises(UserError, match=r"other settings: short_side 64 \(now 80\)"):
        prepare(read_folder(source), out, PrepareSettings(short_side=80, flow_scale=None))
    with pytest.raises(UserError, match="another list of clips"):
        prepare(read_folder(source, val_fraction=0), out, NO_FLOW)
    assert contents(out) == before
    with pytest.raises(UserError, match="something that is no data set"):
        prepare(read_folder(source), source, NO_FLOW)


def test_p8_a_bad_file_is_quarantined_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "in")
    (source / "run" / "bad.mp4").write_text("no video")
    assert command("folder", source, tmp_path / "out", "--short-side", 64, "--no-flow", "--workers", 1) == 0
    captured = capsys.readouterr()
    assert "1 quarantined" in captured.out and "quarantined run/bad.mp4: Invalid data" in captured.err
    rows = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["reason"][:12]) for row in rows] == [("run/bad.mp4", "Invalid data")]
    data = DataSet.open(tmp_path / "out")
    assert sum(map(data.num_samples, data.splits)) == 6


def test_listed_files_that_are_not_there_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in", classes=("run",), clips=3)
    (tmp_path / "l.txt").write_text("run/run 0.mp4 run\nrun/gone.mp4 run\nrun/run 1.mp4 run\n")
    words = ("list", tmp_path / "l.txt", tmp_path / "out", "--root", source, "--short-side", 64, "--no-flow")
    with pytest.raises(UserError, match="1 of 3 listed clips are not on the disk"):
        command(*words, "--workers", 1)
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # the second time nothing is to do
        assert command(*words, "--workers", 1, "--max-missing", 0.5) == 0
        captured = capsys.readouterr()
        assert "2 clips (train 2)" in captured.out and "1 missing, 0 quarantined" in captured.out
        assert "1 listed clips are not on the disk" in captured.err
    assert (tmp_path / "out/missing.txt").read_text() == "run/gone.mp4\n"


def test_p8_more_bad_files_than_allowed_fail_and_keep_what_is_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in")
    for i in range(2):
        (source / "run" / f"bad{i}.mp4").write_text("no video")
    out = tmp_path / "out"
    words = ("folder", source, out, "--short-side", 64, "--no-flow", "--val-fraction", 0, "--workers", 1)
    assert command(*words) == 1
    assert "2 of 8 clips are bad, more than --max-bad 0.01 allows" in capsys.readouterr().err
    assert not (out / "dataset.json").exists() and not list(out.glob("*.tar"))
    assert command(*words, "--max-bad", 0.5) == 0
    assert "6 clips are done already" in capsys.readouterr().err
    assert DataSet.open(out).num_samples("train") == 6 and verify(out) == []


def test_p12_when_every_file_is_bad_nothing_is_left(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "in/run").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/run/bad{i}.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"no clip of the split train can be decoded.*run/bad0\.mp4 \(Invalid"):
        prepare(read_folder(tmp_path / "in", val_fraction=0), tmp_path / "out", NO_FLOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder", "nowhere", "out"], "nowhere does not exist"),
        (["folder", "empty", "out"], "holds no videos"),
        (["folder", "half", "out"], "half/b holds no video"),
        (["list", "nowhere.txt", "out"], "nowhere.txt does not exist"),
        (["list", "word.txt", "out"], "word.txt line 2 is 'only-a-path'"),
        (["list", "twice.txt", "out"], "twice.txt line 2 repeats 'half/a/1.mp4' of .*twice.txt line 1"),
        (["list", "mixed.txt", "out"], "mixed.txt line 2 has label 3 among labels that are names"),
        (["list", "gone.txt", "out"], "none of the 1 listed files exists.*--root"),
        (["list", "blank.txt", "out"], "hold no line"),
        (["list", "good.txt", "out", "--root", "nowhere"], "--root .*nowhere does not exist"),
        (["list", "good.txt", "out", "--classes", "word.txt"], "good.txt line 1 has label 7"),
        (["list", "empty", "out"], "holds no train.txt"),
        (
            ["folder", "half/a", "out", "--short-side", "100"],
            "100 is not a multiple of 16; give for example 96",
        ),
        (["folder", "half/a", "out", "--size", "big"], "--size is 'big'"),
        (["folder", "half/a", "out", "--size", "64x64", "--codec", "vp9"], "below 128x128"),
        (["folder", "half/a", "out", "--fps", "fast"], "--fps is 'fast'"),
        (["folder", "half/a", "out", "--fps", "0"], "fps is 0; give 1 to 240"),
        pytest.param(
            ["folder", "good", "out", "--flow-device", "cuda"],
            "PyTorch sees no GPU here; give --flow-device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["folder", "good", "out", "--workers", "0"], "workers is 0"),
        (["folder", "good", "out", "--share", "3of4"], "--share is '3of4'; give I/N"),
        (["folder", "good", "out", "--share", "3/2"], "--share is 3/2; give I/N with I from 1 to N"),
        (["folder", "good", "out", "--max-bad", "2"], "share of bad clips is 2"),
        (["folder", "good", "out", "--val-fraction", "1"], "validation share is 1"),
        (["folder", "good", "good.txt"], "good.txt is a file"),
    ],
)
def test_p12_mistakes_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "half/a", "half/b", "good/a"):
        Path(folder).mkdir(parents=True)
    Path("half/a/1.mp4").touch()
    Path("good/a/1.mp4").touch()
    Path("word.txt").write_text("half/a/1.mp4 0\nonly-a-path\n")
    Path("twice.txt").write_text("half/a/1.mp4 0\nhalf/a/1.mp4 1\n")
    Path("mixed.txt").write_text("half/a/1.mp4 run\ngood/a/1.mp4 3\n")
    Path("gone.txt").write_text("gone.mp4 0\n")
    Path("good.txt").write_text("good/a/1.mp4 7\n")
    Path("blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match=message) as caught:
        command(*words)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", clips=5, frames=20)
    prepare(read_folder(source), tmp_path / "whole", SMALL)
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from dataloaders.prepare import prepare;"
        "from dataloaders.sources import read_folder; from dataloaders.transcode import PrepareSettings;"
        "prepare(read_folder(Path(sys.argv[1])), Path(sys.argv[2]), PrepareSettings(short_side=64))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], cwd=root)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".work/samples/*/*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {f: f.stat().st_mtime_ns for f in out.glob(".work/samples/*/*.json")}
    assert done and not (out / "dataset.json").exists()
    with pytest.raises(UserError, match=r"no dataset\.json"):
        DataSet.open(out)
    prepare(read_folder(source), out, SMALL)
    assert contents(out) == contents(tmp_path / "whole")


def test_shares_in_any_order_end_with_the_bytes_of_one_run(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for i in range(5):
        write_video(source / "run" / f"{i}.mp4", moving(6, step=1 + i))
    (source / "run" / "bad.mp4").write_bytes(b"no video")
    listing = read_folder(source, val_fraction=0.4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare(listing, whole, SMALL)
    assert prepare_share(listing, parts, SMALL, (3, 3))[0] == 2
    assert prepare_share(listing, parts, SMALL, (1, 3))[0] == 2
    assert not (parts / "dataset.json").exists()
    # The second share never ran; the run without a share does its part.
    report = prepare(listing, parts, SMALL)
    assert report.finished and not report.already
    assert {f.name: f.read_bytes() for f in parts.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    # A task that comes late finds all done, and changes nothing.
    assert prepare_share(listing, parts, SMALL, (2, 3)) == (2, ())
    assert sorted(f.name for f in parts.iterdir()) == sorted(f.name for f in whole.iterdir())
    with pytest.raises(UserError, match=r"other settings: flow_scale 0\.5"):
        prepare_share(listing, parts, NO_FLOW, (1, 3))


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "import time; from dataloaders.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(2) as pool:\n"
        "        list(pool.map(time.sleep, [0, 0.2, 0.2])); print(*pool._processes, flush=True)\n"
        "        pool.submit(time.sleep, 300).result()"
    )
    (tmp_path / "pool.py").write_text(code)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    assert len(workers) == 2 and all(running(pid) for pid in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers go on without their parent"
        time.sleep(0.05)


def running(pid: str) -> bool:
    """Is there such a process, and not only its exit status?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_next_run_goes_on(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in", clips=5, frames=30)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(960_000))
    out = small_disk / "data"
    words = ["prepare", "folder", str(source), str(out), "--short-side", "64", "--workers", "1"]
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said and str(out) in said and "run the same command again" in said
    assert not (out / "dataset.json").exists() and not list(out.rglob("*.tmp"))
    done = len(list(out.rglob("*.json"))) - 1
    assert done > 0
    ballast.unlink()
    assert main(words) == 0
    assert f"{done} clips are done already" in capsys.readouterr().err
    assert verify(out) == []


def test_a_disk_that_fills_while_shards_are_written_leaves_no_part_of_one(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in", clips=5, frames=30)
    words = ["prepare", "folder", str(source), "--short-side", "64", "--workers", "1"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    ballast = small_disk / "ballast"
    # Room for the samples, each file of which takes whole pages, and for a part of the shards.
    ballast.write_bytes(bytes(2**20 - int(1.4 * size) - 60_000))
    out = small_disk / "data"
    assert main([*words, str(out)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said and f"{out}/" in said and ".tar" in said
    assert not (out / "dataset.json").exists() and not list(out.glob("*.tmp"))
    ballast.unlink()
    assert main([*words, str(out)]) == 0
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }


def test_names_and_formats_that_are_seen_in_the_wild(tmp_path: Path) -> None:
    """Awkward names, HEVC, and an AVI whose tags are not UTF-8."""
    folder = tmp_path / "in" / "it's a class!"
    names = ["a b.mp4", "plus+sign & more.mp4", 'quo"te.mp4', "żółw.mp4", "100%.mp4"]
    for name in names:
        write_video(folder / name, moving(5))
    write_video(folder / "hevc.mp4", moving(5), codec="libx265")
    write_video(folder / "tagged.avi", moving(5), codec="mpeg4")
    riff = (folder / "tagged.avi").read_bytes()
    at = riff.index(b"ISFT") + 8
    (folder / "tagged.avi").write_bytes(riff[:at] + b"\xff\xfe\xe9\xe8" + riff[at + 4 :])
    report = prepare(read_folder(tmp_path / "in", val_fraction=0), tmp_path / "out", SMALL)
    assert report.quarantined == () and report.prepared == {"train": len(names) + 2}
    found = samples_of(DataSet.open(tmp_path / "out"), "train")
    assert set(found) == {f"it's a class!/{name}" for name in (*names, "hevc.mp4", "tagged.avi")}
    assert verify(tmp_path / "out", deep=True) == []


def test_an_end_between_two_shards_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = read_folder(make_source(tmp_path / "in"), val_fraction=0)
    settings = PrepareSettings(short_side=64, flow_scale=None, shard_bytes=8_000)
    prepare(listing, tmp_path / "whole", settings)
    replace = Path.replace

    def die_at_the_second_shard(self: Path, target: Path) -> Path:
        if target.name == "train-000001.tar":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die_at_the_second_shard)
        prepare(listing, tmp_path / "out", settings)
    first = (tmp_path / "out/train-000000.tar").stat().st_mtime_ns
    prepare(listing, tmp_path / "out", settings)
    assert (tmp_path / "out/train-000000.tar").stat().st_mtime_ns == first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_fps_source_keeps_each_clip_s_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "in/a/slow.mp4", moving(5), rate=10)
    write_video(tmp_path / "in/a/fast.mp4", moving(9), rate=Fraction(30000, 1001))
    settings = PrepareSettings(short_side=64, fps=None, flow_scale=None)
    prepare(read_folder(tmp_path / "in", val_fraction=0), tmp_path / "out", settings)
    data = DataSet.open(tmp_path / "out")
    samples = samples_of(data, "train")
    assert {s: (i.num_frames, round(i.fps, 2)) for s, (i, _) in samples.items()} == {
        "a/slow.mp4": (5, 10.0),
        "a/fast.mp4": (9, 29.97),
    }
    assert data.manifest["video"]["fps"] is None


def test_the_help_names_what_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("folder", "list"):
        with pytest.raises(SystemExit) as ended:
            command(kind, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert f"rev2net prepare {kind} " in text and "--max-bad" in text and "examples:" in text
    assert os.linesep in text


def test_real_clips_of_a_list_are_prepared(shared_videos: Path, tmp_path: Path) -> None:
    names = ["weizmann/bend/subj01_bend.mp4 0", "weizmann/jack/subj01_jack.mp4 1"]
    names.append("ucf101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 2")
    (tmp_path / "l.txt").write_text("\n".join(names))
    assert command("list", tmp_path / "l.txt", tmp_path / "out", "--root", shared_videos, "--size", "64x48",
                   "--no-flow", "--workers", 1) == 0  # fmt: skip
    data = DataSet.open(tmp_path / "out")
    assert data.manifest["video"]["sizes"] == {"64x48": 3}
    infos = {source: info for source, (info, _) in samples_of(data, "train").items()}
    with av.open(str(shared_videos / "weizmann/bend/subj01_bend.mp4")) as container:
        assert infos["weizmann/bend/subj01_bend.mp4"].num_frames == container.streams.video[0].frames
    assert verify(tmp_path / "out", deep=True) == []
