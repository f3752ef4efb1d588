from __future__ import annotations

import argparse
import errno
import json
import os
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from clips import contents, make_source, moving, write_video

from dataloaders.errors import UserError
from dataloaders.flow import decode_flow, tvl1
from dataloaders.prepare import prepare
from dataloaders.prepare_cli import add_prepare_arguments, run_prepare
from dataloaders.shards import DataSet, SampleInfo, ShardReader
from dataloaders.sources import SourceClip, SourceListing, read_folder
from dataloaders.transcode import PrepareSettings, area_average, transcode
from dataloaders.verify import verify
from dataloaders.video import Codec, VideoSource, decode_luma, gray, stored_size

SMALL = PrepareSettings(short_side=64)
NO_FLOW = PrepareSettings(short_side=64, flow_scale=None)


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
        each = {"train": 2, "val": 1}[split]
        assert Counter(info.label for info, _ in samples.values()) == {0: each, 1: each}
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
    (tmp_path / "test.txt").write_text("run/run 2.mp4 run\njump/jump 1.mp4 jump\n")
    root = tmp_path / "in"
    assert command("list", tmp_path / "train.txt", tmp_path / "a", "--val", tmp_path / "val.txt",
                   "--test", tmp_path / "test.txt", "--root", root, "--short-side", 64, "--no-flow",
                   "--workers", 1) == 0  # fmt: skip
    assert command("list", tmp_path, tmp_path / "b", "--root", root, "--short-side", 64, "--no-flow",
                   "--workers", 1) == 0  # fmt: skip
    data = DataSet.open(tmp_path / "a")
    assert (data.classes, data.num_samples("train"), data.num_samples("val")) == (("jump", "run"), 3, 1)
    assert not data.has_flow and set(samples_of(data, "test")) == {"run/run 2.mp4", "jump/jump 1.mp4"}
    assert {s: i.label for s, (i, _) in samples_of(data, "train").items()} == {
        "jump/jump 0.mp4": 0,
        "run/run 0.mp4": 1,
        "run/run 1.mp4": 1,
    }
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


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
    options = ("--short-side", 64, "--flow-scale", 1)
    assert command("folder", source, tmp_path / "a", *options, "--workers", 1) == 0
    assert command("folder", source, tmp_path / "b", *options, "--workers", 2) == 0
    assert DataSet.open(tmp_path / "a").flow_scale == 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "a").iterdir()}
    capsys.readouterr()
    assert command("folder", source, tmp_path / "a", *options) == 0
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


def test_classes_that_a_split_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that count from 1, and a class whose one video for testing is none."""
    source = make_source(tmp_path / "in")
    videos = sorted(str(file.relative_to(source)) for file in source.rglob("*.mp4"))
    (source / "bad.mp4").write_text("no video")
    (tmp_path / "train.txt").write_text(f"{videos[0]} 1\n{videos[1]} 2\n")
    (tmp_path / "val.txt").write_text(f"{videos[2]} 1\nbad.mp4 2\n")
    words = ["--val", tmp_path / "val.txt", "--root", source, "--max-bad", 0.5]
    settings = ["--short-side", 64, "--no-flow", "--workers", 1]
    assert command("list", tmp_path / "train.txt", tmp_path / "out", *words, *settings) == 0
    said = capsys.readouterr().err
    assert "1 class has no clip in the split train: 0\n2 classes have no clip in the split val: 0, 2\n" in said


def test_p8_a_bad_file_is_quarantined_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "in")
    (source / "run" / "bad.mp4").write_text("no video")
    assert command("folder", source, tmp_path / "out", "--short-side", 64, "--no-flow", "--workers", 1) == 0
    captured = capsys.readouterr()
    assert "1 quarantined" in captured.out and "quarantined run/bad.mp4: it is no video, or was cut off" in captured.err
    rows = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["reason"]) for row in rows] == [("run/bad.mp4", "it is no video, or was cut off")]
    data = DataSet.open(tmp_path / "out")
    assert sum(map(data.num_samples, data.splits)) == 6
    of_split = {entry["split"]: 1 for entry in rows}
    for split in data.splits:
        assert data.left_out(split) == {"missing": 0, "quarantined": of_split.get(split, 0)}


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
    assert DataSet.open(tmp_path / "out").left_out("train") == {"missing": 1, "quarantined": 0}


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


def test_p8_an_error_of_the_disk_says_nothing_of_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = read_folder(make_source(tmp_path / "in"), val_fraction=0)
    first, real = listing.clips[0].path, av.open
    fails = [1]

    def flaky(file: Any, *args: Any, **words: Any) -> Any:
        if str(file).endswith(first.name) and fails[0]:
            fails[0] -= 1
            raise OSError(errno.EIO, "Input/output error", str(first))
        return real(file, *args, **words)

    monkeypatch.setattr(av, "open", flaky)
    assert prepare(listing, tmp_path / "passing", NO_FLOW, workers=1).quarantined == ()
    assert fails == [0]

    fails[0] = 9  # where the file can be read all the same, its reader means the video: some say EIO of damaged ones
    (bad,) = prepare(listing, tmp_path / "damaged", NO_FLOW, workers=1, max_bad=0.5).quarantined
    assert bad.file == listing.clips[0].relative and "Input/output error" in bad.reason

    fails[0] = 9
    monkeypatch.setattr("dataloaders.prepare._read_whole", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "?")))
    with pytest.raises(OSError, match=r"\?"):
        prepare(listing, tmp_path / "gone", NO_FLOW, workers=1)


def test_p12_clips_of_one_key_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = read_folder(make_source(tmp_path / "in"), val_fraction=0)
    monkeypatch.setattr(SourceClip, "key", "a-0123456789")
    with pytest.raises(UserError, match="get the same key a-0123456789: rename one of them"):
        prepare(listing, tmp_path / "out", NO_FLOW)
    assert not (tmp_path / "out").exists()


def test_p12_when_every_file_is_bad_nothing_is_left(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "in/run").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/run/bad{i}.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"no clip of the split train can be decoded.*run/bad0\.mp4 \(it is no video"):
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
        (["folder", "half/a", "out", "--fps", "1e400"], "give 1 to 240"),
        (["folder", "half/a", "out", "--shard-mb", "nan"], "--shard-mb is nan; give a number above 0"),
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
        (["folder", "good", "good/a/../out"], "OUT good/a/../out lies in SOURCE good"),
        (["folder", "good", "good"], "OUT good lies in SOURCE good"),
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
    assert not Path("out").exists() and not Path("good/out").exists()


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


def test_what_no_decoder_or_encoder_takes_is_quarantined(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / f"in/run/{name}.mp4", moving(5))
    encrypted = tmp_path / "in/run/b.mp4"
    encrypted.write_bytes(encrypted.read_bytes().replace(b"avc1", b"encv"))
    write_video(tmp_path / "in/run/c.mkv", moving(3, height=1600, width=8), codec="ffv1")
    settings = PrepareSettings(short_side=256, flow_scale=None)
    report = prepare(read_folder(tmp_path / "in", val_fraction=0), tmp_path / "out", settings, max_bad=0.9)
    assert report.prepared == {"train": 1}
    assert [(entry.file, entry.reason.split(",")[0].split(" (")[0]) for entry in report.quarantined] == [
        ("run/b.mp4", "its video is encrypted"),
        ("run/c.mkv", "cannot be encoded"),
    ]


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
