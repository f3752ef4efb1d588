"""Which clips are to be prepared: a folder per class, or lists of `path label`."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.errors import UserError

SPLITS = ("train", "val", "test")
_MEANT = {
    **{split: split for split in SPLITS},
    **{"training": "train", "validation": "val", "valid": "val", "validate": "val", "testing": "test"},
}
"""What folders of splits are called here and elsewhere, in lower case, and hardly any class is."""
_SHOWN = 5
"""Names that a message lists; the rest is counted."""
# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
})
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceClip:
    """One source file.

    Attributes:
        relative: path relative to the source's root, with `/`; it names the clip wherever the root lies.
    """

    path: Path
    relative: str
    split: str
    label: int
    class_name: str

    @property
    def key(self) -> str:
        """Name in the shards: readable, unique for the relative path, letters, digits, `_` and `-` only."""
        readable = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(self.relative).stem)[:60]
        return f"{readable}-{_digest(self.relative)[:10]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceListing:
    """All clips of a source.

    Attributes:
        skipped: files that were left out because their names are not those of videos.
        missing: what the lists name and the disk lacks.
        official: the official lists that it was read from, and which of their splits (None: they have one).
    """

    classes: tuple[str, ...]
    clips: tuple[SourceClip, ...]
    skipped: tuple[str, ...] = ()
    missing: tuple[SourceClip, ...] = ()
    official: tuple[str, int | None] | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that hold clips, in the order train, val, test, others."""
        present = {clip.split for clip in self.clips}
        return tuple(s for s in SPLITS if s in present) + tuple(sorted(present - set(SPLITS)))

    def fingerprint(self) -> str:
        """Hash over classes, splits, labels, relative paths and file sizes, in any order of the clips."""
        rows = sorted(f"{c.split}\t{c.label}\t{_size(c.path)}\t{c.relative}" for c in self.clips)
        return _digest("\n".join([*self.classes, "", *rows]))


def read_folder(root: Path, *, val_fraction: float = 0.2, seed: int = 0) -> SourceListing:
    """Clips of `root/CLASS/…` or `root/{train,val,test}/CLASS/…`, classes in alphabetical order.

    Links to folders are followed, into each folder once for a class and into none that the class lies in.
    Without a folder val, `val_fraction` of every class of train goes to the split val: those with the smallest hash
    of (seed, relative path), at least one where a class has two.

    Raises:
        UserError: the folder is missing, holds no video or folders of splits beside others, a video lies in no class
            folder, a class folder is empty, or the fraction is not one.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"the validation share is {val_fraction}; give a number of at least 0 and below 1")
    if not root.is_dir():
        raise UserError(f"source folder {root} does not exist; give a folder that holds a folder per class")
    folders = _subfolders(root)
    has_splits = _are_splits(root, [folder.name for folder in folders])
    _refuse_without_class([root, *folders] if has_splits else [root])
    found: list[tuple[str, str, Path]] = []
    skipped: list[str] = []
    for split_folder in folders if has_splits else [root]:
        split = split_folder.name if has_splits else "train"
        for folder in _subfolders(split_folder):
            own = folder.resolve()
            files = list(_files(folder, {own, *own.parents}))
            videos = [f for f in files if _is_video(f)]
            skipped += [f.relative_to(root).as_posix() for f in files if not _is_video(f)]
            if not videos:
                raise UserError(f"class folder {folder} holds no video; add videos to it or remove it")
            found += [(split, folder.name, video) for video in videos]
    if not found:
        raise UserError(
            f"source folder {root} holds no videos; put each class's videos into a folder of its own, "
            "CLASS/video.mp4 or train/CLASS/video.mp4 and val/CLASS/video.mp4"
        )
    classes = tuple(sorted({name for _, name, _ in found}))
    clips = tuple(
        SourceClip(
            path=path,
            relative=path.relative_to(root).as_posix(),
            split=split,
            label=classes.index(name),
            class_name=name,
        )
        for split, name, path in found
    )
    if not any(clip.split == "val" for clip in clips):
        clips = split_off(clips, val_fraction, seed)
    return SourceListing(classes=classes, clips=clips, skipped=tuple(skipped))


def read_lists(
    lists: Iterable[tuple[str, Path]],
    root: Path,
    *,
    classes_file: Path | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> SourceListing:
    """Clips of (split, list) pairs, whose lines are `path label`; the path is relative to `root`.

    A path may hold spaces. Labels are numbers from 0 (names from `classes_file`, else the numbers
    themselves), or names, which then are numbered alphabetically. Empty lines and lines that start with `#`
    are passed over. A share `val_fraction` of the split train becomes val, as in `read_folder`.

    Raises:
        UserError: a file is missing, a line cannot be read or stands twice, or no listed file exists.
    """
    rows: list[tuple[str, str, str, str]] = []
    where_seen: dict[str, str] = {}
    for split, file in lists:
        for where, path, word in _read_list(file):
            if path in where_seen:
                raise UserError(f"{where} repeats {path!r} of {where_seen[path]}; list every file once")
            where_seen[path] = where
            rows.append((split, path, word, where))
    if not rows:
        raise UserError("the lists hold no line; give lists with one `path label` per line")
    classes, labels = _labels([(word, where) for _, _, word, where in rows], classes_file)
    listed = tuple(
        SourceClip(path=root / path, relative=path, split=split, label=label, class_name=classes[label])
        for (split, path, _, _), label in zip(rows, labels, strict=True)
    )
    present: list[SourceClip] = []
    missing: list[SourceClip] = []
    for clip in listed:
        (present if clip.path.is_file() else missing).append(clip)
    if not present:
        raise UserError(
            f"none of the {len(listed)} listed files exists, the first would be {listed[0].path}; "
            "give the folder that the paths are relative to with --root"
        )
    clips = split_off(present, val_fraction, seed) if val_fraction > 0 else tuple(present)
    return SourceListing(classes=classes, clips=clips, missing=tuple(missing))


def _are_splits(root: Path, names: Sequence[str]) -> bool:
    """Whether folders are those of splits, and not of classes; UserError where only some are, or by other names."""
    meant = {name: _MEANT[name.lower()] for name in names if name.lower() in _MEANT}
    others = [name for name in names if name not in meant]
    if meant and others:
        raise UserError(
            f"source folder {root} holds {_some(others)} beside {_some(list(meant))}, which is what folders of splits "
            "are called: leave only those of splits or only those of classes there, and rename a class of such a name"
        )
    renamed = [f"{name} to {split}" for name, split in meant.items() if name != split]
    if renamed:
        raise UserError(
            f"source folder {root} holds {', '.join(names)}: call folders of splits {', '.join(SPLITS)} "
            f"(rename {', '.join(renamed)})"
        )
    return bool(meant)


def _refuse_without_class(folders: Iterable[Path]) -> None:
    """UserError for videos beside the class folders: nothing tells what they show."""
    for folder in folders:
        names = [
            f.name for f in sorted(folder.iterdir()) if _is_video(f) and not f.name.startswith(".") and f.is_file()
        ]
        if names:
            raise UserError(
                f"folder {folder} holds {_some(names)} beside its class folders: move each video into the folder of "
                "its class, or elsewhere"
            )


def _files(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """Files below a folder that are not hidden, in alphabetical order; links lead into no folder of `entered`."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and (real := path.resolve()) not in entered:
            entered.add(real)
            yield from _files(path, entered)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def split_off(clips: Sequence[SourceClip], fraction: float, seed: int) -> tuple[SourceClip, ...]:
    """Move a share of every class of the split train to val, chosen by the hash of (seed, relative path).

    Train keeps at least one clip of every class; val gets at least one where there are two.
    """
    by_class: dict[int, list[SourceClip]] = defaultdict(list)
    for clip in clips:
        if clip.split == "train":
            by_class[clip.label].append(clip)
    moved: set[str] = set()
    for members in by_class.values():
        count = min(max(round(len(members) * fraction), 1 if fraction > 0 else 0), len(members) - 1)
        ranked = sorted(members, key=lambda clip: _digest(f"{seed}:{clip.relative}"))
        moved.update(clip.relative for clip in ranked[:count])
    return tuple(
        SourceClip(
            path=c.path,
            relative=c.relative,
            split="val" if c.relative in moved else c.split,
            label=c.label,
            class_name=c.class_name,
        )
        for c in clips
    )


def shuffled(clips: Sequence[SourceClip], seed: int) -> list[SourceClip]:
    """A seeded random order in which every stretch holds each class about as often as the whole does.

    The r-th clip of a class of n, in random order, goes to a random place in the r-th of n equal parts of the
    sequence. So a shard cut from it holds a class's expected share up to one clip.
    """
    by_class: dict[int, list[tuple[str, SourceClip]]] = defaultdict(list)
    for clip in clips:
        by_class[clip.label].append((_digest(f"{seed}:order:{clip.relative}"), clip))
    placed: list[tuple[float, str, SourceClip]] = []
    for members in by_class.values():
        members.sort(key=lambda member: member[0])
        for rank, (digest, clip) in enumerate(members):
            # The low bits place it: the high ones already gave the rank.
            place = (rank + int(digest[-13:], 16) / 16**13) / len(members)
            placed.append((place, digest, clip))
    placed.sort(key=lambda entry: entry[:2])
    return [clip for _, _, clip in placed]


def numbered_lines(file: Path, kind: str, wanted: str) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1.

    Raises:
        UserError: `file`, which is a `kind`, is missing or is no text; `wanted` is what to give instead.
    """
    if not file.is_file():
        raise UserError(f"{kind} {file} does not exist; give {wanted}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {file} is no text; give {wanted}") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def read_classes(file: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of the labels; UserError where the file is missing or no text."""
    return tuple(name for _, name in numbered_lines(file, "classes file", "a file with one name per line"))


def _read_list(file: Path) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for number, line in numbered_lines(file, "list", "a file with one `path label` per line"):
        if line.startswith("#"):
            continue
        # Of paths and class names with spaces: a comma in a .csv, a tab anywhere.
        if file.suffix.lower() == ".csv":
            words = next(csv.reader([line], skipinitialspace=True))
        else:
            words = line.split("\t") if "\t" in line else line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise UserError(
                f"{file} line {number} is {line!r}; it must be `path label`, in a .csv `path,label`, without a heading"
            )
        rows.append((f"{file} line {number}", words[0].strip(), words[1].strip()))
    return rows


def _labels(words: Sequence[tuple[str, str]], classes_file: Path | None) -> tuple[tuple[str, ...], Sequence[int]]:
    classes: tuple[str, ...] | None = None
    if classes_file is not None:
        classes = read_classes(classes_file)
    if all(re.fullmatch(r"\d+", word) for word, _ in words):
        labels = [int(word) for word, _ in words]
        if classes is None:
            return tuple(str(i) for i in range(max(labels) + 1)), labels
        for label, (_, where) in zip(labels, words, strict=True):
            if label >= len(classes):
                raise UserError(f"{where} has label {label}; {classes_file} names 0 to {len(classes) - 1}")
        return classes, labels
    if classes is None:
        for word, where in words:
            if re.fullmatch(r"-?\d+", word):
                raise UserError(f"{where} has label {word} among labels that are names; use numbers for all, or names")
        classes = tuple(sorted({word for word, _ in words}))
    numbers = {name: number for number, name in enumerate(classes)}
    for word, where in words:
        if word not in numbers:
            raise UserError(f"{where} has label {word!r}, which {classes_file} does not name; correct one")
    return classes, [numbers[word] for word, _ in words]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
