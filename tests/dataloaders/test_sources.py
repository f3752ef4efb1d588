"""The listings that a preparation starts from: folders, lists, their split, and their order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dataloaders.errors import UserError
from dataloaders.sources import SourceClip, read_folder, read_lists, shuffled, split_off


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


def test_a_folder_train_alone_gives_its_share_to_val_and_hidden_files_are_no_clips(tmp_path: Path) -> None:
    for name in ("a/1.mp4", "a/2.mp4", "a/.thumbs/1.mp4", "a/.3.mp4"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    listing = read_folder(tmp_path, val_fraction=0.5)
    assert sorted((clip.split, clip.class_name) for clip in listing.clips) == [("train", "a"), ("val", "a")]
    (tmp_path / "train").rename(tmp_path / "training")
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="holds training, val: call folders of splits train, val, test"):
        read_folder(tmp_path)


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Train/run", "Test/run"), r"holds Test, Train: .* \(rename Test to test, Train to train\)"),
        (("train/run", "val/run", "extra/run"), "holds extra beside train, val, which is what folders of splits"),
        (("Validation/run", "jump"), "holds jump beside Validation"),
    ],
)
def test_p12_folders_of_splits_are_not_taken_for_classes(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    make_files(tmp_path, *(f"{name}/1.mp4" for name in names))
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize("stray", ["2.mp4", "val/2.mp4"])
def test_p12_a_video_beside_the_class_folders_is_refused(tmp_path: Path, stray: str) -> None:
    make_files(tmp_path, *(("train/a/1.mp4", "val/a/1.mp4") if "/" in stray else ("a/1.mp4",)), stray, "notes.txt")
    with pytest.raises(UserError, match=rf"folder {(tmp_path / stray).parent} holds 2\.mp4 beside its class folders"):
        read_folder(tmp_path)


def test_linked_folders_are_read_once_and_lead_into_no_circle(tmp_path: Path) -> None:
    make_files(tmp_path, "elsewhere/deep/2.mp4", "in/a/1.mp4", "in/b/3.mp4")
    for link, target in (("in/a/linked", "elsewhere"), ("in/a/again", "elsewhere"), ("elsewhere/up", "in")):
        (tmp_path / link).symlink_to(tmp_path / target)
    clips = read_folder(tmp_path / "in", val_fraction=0).clips
    assert [clip.relative for clip in clips] == ["a/1.mp4", "a/again/deep/2.mp4", "b/3.mp4"]


@pytest.mark.parametrize(("fraction", "val"), [(0.0, {}), (0.01, {1: 1}), (0.9, {1: 2})])
def test_train_keeps_a_clip_of_every_class(fraction: float, val: dict[int, int]) -> None:
    clips = [*many_clips(1, 1), *(replace(clip, label=1, relative=f"1/{clip.relative}") for clip in many_clips(1, 3))]
    parts = split_off(clips, fraction, 0)
    assert Counter(clip.label for clip in parts if clip.split == "val") == val


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", 'my b.mp4,high jump\n"a, b.mp4", run\n'),
        ("train.txt", "my b.mp4\thigh jump\na, b.mp4 run\n"),
    ],
)
def test_paths_and_classes_of_a_list_may_have_spaces_and_commas(name: str, text: str, tmp_path: Path) -> None:
    make_files(tmp_path, "my b.mp4", "a, b.mp4")
    (tmp_path / name).write_text(text)
    clips = read_lists([("train", tmp_path / name)], tmp_path).clips
    assert sorted((clip.relative, clip.class_name) for clip in clips) == [
        ("a, b.mp4", "run"),
        ("my b.mp4", "high jump"),
    ]


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "1.mp4").touch()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf1.mp4 a\n")
    assert [clip.relative for clip in read_lists([("train", tmp_path / "list.txt")], tmp_path).clips] == ["1.mp4"]


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
