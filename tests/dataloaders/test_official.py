"""Official layouts, against the official lists; most videos are empty files, since readers never open them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clips import moving, write_video

from dataloaders.classmap import read_class_map
from dataloaders.errors import UserError
from dataloaders.official import read_hmdb51, read_kinetics, read_ucf101
from dataloaders.prepare import prepare
from dataloaders.shards import DataSet
from dataloaders.sources import SourceListing, read_lists
from dataloaders.transcode import PrepareSettings

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ROOT / "configs" / "classes"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def counts(listing: SourceListing) -> Counter[str]:
    """Clips of each split, found or missing."""
    return Counter(clip.split for clip in (*listing.clips, *listing.missing))


@pytest.mark.parametrize(("split", "train", "val"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_ucf101_splits_have_the_published_sizes(
    tmp_path: Path, shared_annotations: Path, split: int, train: int, val: int
) -> None:
    first = (shared_annotations / "ucf101" / f"trainlist{split:02d}.txt").read_text().split()[0]
    touch(tmp_path, first)
    listing = read_ucf101(tmp_path, shared_annotations / "ucf101", split)
    assert counts(listing) == {"train": train, "val": val}
    assert [clip.relative for clip in listing.clips] == [first] and listing.official == ("ucf101", split)
    assert len(listing.classes) == 101 and listing.classes[0] == "ApplyEyeMakeup" and listing.classes[100] == "YoYo"
    for clip in (*listing.clips, *listing.missing):
        assert listing.classes[clip.label] == clip.class_name == clip.relative.split("/")[0]


@pytest.mark.parametrize("split", [1, 2, 3])
def test_hmdb51_splits_have_the_published_sizes(tmp_path: Path, shared_annotations: Path, split: int) -> None:
    lists = shared_annotations / "hmdb51" / "testTrainMulti_7030_splits"
    marks = [line.split() for line in (lists / f"wave_test_split{split}.txt").read_text().splitlines()]
    by_mark = {mark: f"wave/{name}" for name, mark in marks}
    touch(tmp_path, *by_mark.values(), "wave/not-listed.avi")
    listing = read_hmdb51(tmp_path, lists, split)
    assert counts(listing) == {"train": 70 * 51, "val": 30 * 51}
    per_class = Counter((clip.split, clip.label) for clip in (*listing.clips, *listing.missing))
    assert set(per_class.values()) == {70, 30} and len(per_class) == 102
    assert len(listing.classes) == 51 and listing.official == ("hmdb51", split)
    assert {clip.relative: clip.split for clip in listing.clips} == {by_mark["1"]: "train", by_mark["2"]: "val"}


def test_real_files_are_found_whatever_their_names(shared_videos: Path, shared_annotations: Path) -> None:
    ucf = read_ucf101(shared_videos / "ucf101", shared_annotations / "ucf101")
    assert len(ucf.clips) == len(list((shared_videos / "ucf101").rglob("*.avi")))
    hmdb = [
        read_hmdb51(shared_videos / "hmdb51", shared_annotations / "hmdb51" / "testTrainMulti_7030_splits", split).clips
        for split in (1, 2, 3)
    ]
    listed = {clip.relative for clips in hmdb for clip in clips}
    assert any("!" in name for name in listed) and any("+" in name for name in listed)
    assert all(clip.path.is_file() for clips in hmdb for clip in clips)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("train/abseiling/aaaaaaaaaaa.mp4", True),
        ("train/abseiling/aaaaaaaaaaa_000010_000020.mp4", True),
        ("abseiling/aaaaaaaaaaa_000010_000020.mkv", True),
        ("aaaaaaaaaaa.webm", True),
        ("train/aaaaaaaaaaa.MP4", True),
        ("train/abseiling/aaaaaaaaaaa_000010_000021.mp4", False),
        ("train/abseiling/aaaaaaaaaaa.txt", False),
    ],
)
def test_kinetics_clips_are_found_in_every_layout(tmp_path: Path, name: str, listed: bool) -> None:
    touch(tmp_path, f"v/{name}", "v/val/air drumming/bbbbbbbbbbb_000001_000011.mp4")
    table = tmp_path / "k.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "abseiling,aaaaaaaaaaa,10,20,train,0\nair drumming,bbbbbbbbbbb,1,11,validate,0\n"
    )
    listing = read_kinetics(tmp_path / "v", [table])
    assert listing.classes == ("abseiling", "air drumming")
    found = {clip.relative: (clip.split, clip.label) for clip in listing.clips}
    expected: dict[str, tuple[str, int]] = {"val/air drumming/bbbbbbbbbbb_000001_000011.mp4": ("val", 1)}
    assert found == ({name: ("train", 0)} if listed else {}) | expected
    assert [clip.relative for clip in listing.missing] == ([] if listed else ["aaaaaaaaaaa_000010_000020"])


def test_kinetics_copies_and_segments_of_one_video_are_told_apart(tmp_path: Path) -> None:
    videos = tmp_path / "v"
    touch(videos, "val/x y/a.mp4", "train/x_y/a.mp4", "train/x_y/b.mp4", "train/x_y/b_000000_000010.mp4")
    train, val = tmp_path / "k_train.csv", tmp_path / "k_val.csv"
    header = "label,youtube_id,time_start,time_end\n"
    train.write_text(header + "x y,b,0,10\nx y,b,20,30\n")
    val.write_text(header + "x y,a,5,15\n")
    listing = read_kinetics(videos, [train, val])
    assert {(c.split, c.relative) for c in listing.clips} == {
        ("val", "val/x y/a.mp4"),
        ("train", "train/x_y/b_000000_000010.mp4"),
    }
    # b.mp4 could be either segment of b, so it is none.
    assert [c.relative for c in listing.missing] == ["b_000020_000030"]


def test_a_data_set_says_of_which_lists_and_split_it_is(tmp_path: Path) -> None:
    for name in "ab":
        write_video(tmp_path / f"videos/wave/{name}.mp4", moving(5))
    (tmp_path / "wave_test_split2.txt").write_text("a.mp4 1\nb.mp4 2\n")
    settings = PrepareSettings(short_side=64, flow_scale=None)
    prepare(read_hmdb51(tmp_path / "videos", tmp_path, 2), tmp_path / "out", settings)
    assert DataSet.open(tmp_path / "out").official == {"lists": "hmdb51", "split": 2}


def test_the_map_of_twelve_classes_gives_the_classes_of_the_public_lists(shared_annotations: Path) -> None:
    wanted = read_class_map(CLASSES / "ucf_hmdb_12.yaml")
    ucf = {line.split()[1] for line in (shared_annotations / "ucf101" / "classInd.txt").read_text().splitlines()}
    splits = (shared_annotations / "hmdb51" / "testTrainMulti_7030_splits").glob("*_test_split1.txt")
    names = ucf | {file.name.removesuffix("_test_split1.txt") for file in splits}
    assert set(wanted.sources) <= names
    assert set(read_class_map(CLASSES / "ucf_hmdb_16.yaml").sources) <= names
    for file in (shared_annotations / "ucf_hmdb_12").glob("ucf101*"):
        for line in file.read_text().splitlines():
            name, _, label = line.rpartition(",")
            assert wanted.classes.index(wanted.sources[name.split("_")[1]]) == int(label), line


def test_the_sixteen_classes_are_the_twelve_and_four_with_reasons() -> None:
    twelve, sixteen = (read_class_map(CLASSES / f"ucf_hmdb_{n}.yaml") for n in (12, 16))
    assert sixteen.classes[:12] == twelve.classes and len(sixteen.classes) == 16
    assert twelve.sources.items() <= sixteen.sources.items()
    assert (CLASSES / "ucf_hmdb_16.yaml").read_text().count("why:") == 16


def test_a_class_map_filters_any_listing_and_what_is_missing_of_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    words = "a.mp4 Biking\nb.mp4 ride_bike\nc.mp4 YoYo\nd.mp4 Punch\ngone.mp4 Biking\nlost.mp4 YoYo\n"
    (tmp_path / "list.txt").write_text(words)
    (tmp_path / "map.yaml").write_text(
        "classes: [{name: punch, from: [Punch, punch]}, {name: ride_bike, from: [Biking, ride_bike]}]"
    )
    listing = read_class_map(tmp_path / "map.yaml").apply(read_lists([("train", tmp_path / "list.txt")], tmp_path))
    assert [(c.relative, c.class_name, c.label) for c in listing.clips] == [
        ("a.mp4", "ride_bike", 1),
        ("b.mp4", "ride_bike", 1),
        ("d.mp4", "punch", 0),
    ]
    assert [c.relative for c in listing.missing] == ["gone.mp4"]


def test_p12_a_folder_that_cannot_be_listed_is_no_folder_of_missing_clips(
    tmp_path: Path, shared_annotations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "PushUps/v_PushUps_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi")
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("YoYo"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"folder .*/YoYo cannot be listed \(Permission denied\)"):
        read_ucf101(tmp_path, shared_annotations / "ucf101", split=1)


def test_p12_more_missing_clips_than_allowed_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 x\ngone.mp4 x\n")
    listing = read_lists([("train", tmp_path / "list.txt")], tmp_path)
    with pytest.raises(UserError, match=r"1 of 2 listed clips are not on the disk, the first is gone\.mp4"):
        prepare(listing, tmp_path / "out", PrepareSettings(), max_missing=0.4)
    assert not (tmp_path / "out").exists()


def test_p12_a_split_that_is_missing_altogether_is_refused_however_small_it_is(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.mp4" for n in range(20)))
    (tmp_path / "train.txt").write_text("".join(f"{n}.mp4 x\n" for n in range(20)))
    (tmp_path / "val.txt").write_text("gone.mp4 x\n")
    listing = read_lists([(split, tmp_path / f"{split}.txt") for split in ("train", "val")], tmp_path)
    with pytest.raises(UserError, match=r"no listed clip of the split val is on .* first would be gone\.mp4"):
        prepare(listing, tmp_path / "out", PrepareSettings())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ucf101", "nowhere", "out", "--annotations", "lists"], "nowhere does not exist"),
        (["ucf101", "videos", "out", "--annotations", "lists"], "classInd.txt does not exist"),
        (["hmdb51", "packed", "out", "--annotations", "lists"], "unar brush_hair.rar"),
        (["hmdb51", "videos", "out", "--annotations", "lists"], "testTrainMulti_7030_splits"),
        (["kinetics", "videos", "out", "--annotations", "gone.csv"], "gone.csv cannot be read"),
        (["kinetics", "videos", "out", "--annotations", "test.csv"], "no column 'label'"),
        (["kinetics", "videos", "out", "--annotations", "times.csv"], "times.csv line 2 has no times"),
        (["kinetics", "videos", "out", "--annotations", "twice.csv"], "line 3 repeats the clip a"),
        (["kinetics", "videos", "out", "--annotations", "good.csv"], "none of the 1 listed clips exists"),
        (["folder", "videos", "out", "--class-map", "gone.yaml"], "class map gone.yaml does not exist"),
        (["folder", "videos", "out", "--class-map", "good.csv"], "class map good.csv cannot be read"),
        (
            ["folder", "videos", "out", "--class-map", "other.yaml"],
            "map's 'b' comes from q, r, but the source has no such",
        ),
        (["folder", "videos", "out", "--class-map", "both.yaml"], "puts 'x' under 'a' and 'b'"),
        (["folder", "videos", "out", "--class-map", "two.yaml"], "class map two.yaml cannot be read"),
    ],
)
def test_p12_wrong_sources_are_refused_in_one_sentence(
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "videos/x/clip.mp4", "packed/brush_hair.rar", "lists/other.txt")
    columns = "label,youtube_id,time_start,time_end,split\n"
    Path("test.csv").write_text("youtube_id,time_start,time_end,split\na,1,2,test\n")
    Path("times.csv").write_text(columns + "x,a,one,2,train\n")
    Path("twice.csv").write_text(columns + "x,a,1,2,train\nx,a,1,2,val\n")
    Path("good.csv").write_text(columns + "x,a,1,2,train\n")
    Path("other.yaml").write_text("classes: [{name: a, from: [x]}, {name: b, from: [q, r]}]")
    Path("both.yaml").write_text("classes: [{name: a, from: [x]}, {name: b, from: [x]}]")
    Path("two.yaml").write_text("classes: [{name: x, from: [x]}]\nclasses: [{name: y, from: [y]}]")
    assert words in refused("prepare", *arguments)
    assert not Path("out").exists()


SCALE = """
import sys
from pathlib import Path
from dataloaders.classmap import ClassMap
from dataloaders.official import read_kinetics
from dataloaders.sources import shuffled
listing = read_kinetics(Path(sys.argv[1]), [Path(sys.argv[2])])
half = listing.classes[::2]
kept = ClassMap(classes=half, sources=dict(zip(half, half))).apply(listing)
assert 0.4 < (len(kept.clips) + len(kept.missing)) / int(sys.argv[3]) < 0.6
assert len(listing.clips) + len(listing.missing) == int(sys.argv[3])
order = shuffled([*listing.clips, *listing.missing], 0)
assert len({clip.key for clip in order}) == len(order)
# Not ru_maxrss: that also counts what the parent held before this program was started in its place.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_list_as_long_as_kinetics_is_read_filtered_and_ordered_in_a_gigabyte(tmp_path: Path) -> None:
    touch(tmp_path, "v/class 0/000000000_0.mp4")
    lines = (f"class {n % 400},{n:09d}_0,{n % 300},{n % 300 + 10},train" for n in range(306_245))
    table = tmp_path / "k.csv"
    table.write_text("\n".join(["label,youtube_id,time_start,time_end,split", *lines]) + "\n")
    command = [sys.executable, "-c", SCALE, str(tmp_path / "v"), str(table), "306245"]
    said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=280).stdout
    assert int(said) < 1_000_000  # kB
