"""The official layouts of UCF101, HMDB51 and Kinetics, as their authors distribute them.

Every reader looks for the listed files on the disk; those that are not there come back as `SourceListing.missing`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataloaders.errors import UserError
from dataloaders.sources import VIDEO_SUFFIXES, SourceClip, SourceListing, numbered_lines, read_classes

SPLIT_NUMBERS = (1, 2, 3)
_UCF_LISTS = "the official ucfTrainTestlist"
_HMDB_SPLITS = {"1": "train", "2": "val", "0": None}
_KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of an official list: the clip's class and split, and where the list says it."""

    split: str
    class_name: str
    where: str


def read_ucf101(root: Path, annotations: Path, split: int = 1) -> SourceListing:
    """UCF101 (Soomro et al. 2012): `root/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`, ...

    Args:
        root: the folder of the 101 class folders.
        annotations: the official `ucfTrainTestlist`, with `classInd.txt`, `trainlist01.txt`, `testlist01.txt`, ...
        split: 1, 2 or 3. Its test list becomes the split val.

    Raises:
        UserError: a folder or list is missing, a line cannot be read, or no listed file exists.
    """
    _check_split(split)
    _check_root(root, "the class folders of UCF101", "*.rar")
    numbered = [line.split() for _, line in numbered_lines(annotations / "classInd.txt", "list", _UCF_LISTS)]
    if not all(len(words) == 2 and words[0].isdigit() for words in numbered):
        raise UserError(f"{annotations / 'classInd.txt'} is not the official list of `number ClassName` lines")
    classes = tuple(name for _, name in sorted((int(number), name) for number, name in numbered))
    rows: dict[str, _Row] = {}
    for name, part in ((f"trainlist{split:02d}.txt", "train"), (f"testlist{split:02d}.txt", "val")):
        for number, line in numbered_lines(annotations / name, "list", _UCF_LISTS):
            # The training lists have a label after the path, the test lists none; the folder is the class.
            relative = re.sub(r"\s+\d+$", "", line)
            class_name = relative.partition("/")[0]
            where = f"{annotations / name} line {number}"
            if class_name not in classes:
                raise UserError(f"{where} is {line!r}, whose folder is no class; take the official list")
            _add(rows, relative, _Row(part, class_name, where))
    return _from_rows(root, rows, classes, ("ucf101", split))


def read_hmdb51(root: Path, annotations: Path, split: int = 1) -> SourceListing:
    """HMDB51 (Kuehne et al. 2011): `root/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi`, ...

    Args:
        root: the folder of the 51 class folders, unpacked from their archives.
        annotations: the official `testTrainMulti_7030_splits` with `brush_hair_test_split1.txt`, ...
        split: 1, 2 or 3. Clips marked 1 are train, 2 val; those marked 0 are unused.

    Raises:
        UserError: a folder or list is missing, the archives are still packed, a line cannot be read, or no listed file
            exists.
    """
    _check_split(split)
    _check_root(root, "the class folders of HMDB51", "*.rar")
    ending = f"_test_split{split}.txt"
    files = sorted(annotations.glob(f"*{ending}"))
    if not files:
        raise UserError(f"{annotations} holds no *{ending}; give the official folder testTrainMulti_7030_splits")
    rows: dict[str, _Row] = {}
    for file in files:
        class_name = file.name.removesuffix(ending)
        for number, line in numbered_lines(file, "list", "the official testTrainMulti_7030_splits"):
            name, _, mark = line.rpartition(" ")
            where = f"{file} line {number}"
            if mark not in _HMDB_SPLITS or not name:
                raise UserError(f"{where} is {line!r}; it must be `name.avi` and 0, 1 or 2")
            part = _HMDB_SPLITS[mark]
            if part is not None:
                _add(rows, f"{class_name}/{name.strip()}", _Row(part, class_name, where))
    return _from_rows(root, rows, tuple(file.name.removesuffix(ending) for file in files), ("hmdb51", split))


def read_kinetics(root: Path, lists: Sequence[Path], classes_file: Path | None = None) -> SourceListing:
    """Kinetics-400, -600, -700 (Kay et al. 2017): csv lists with label, youtube_id, time_start, time_end, split.

    A clip may be named `ID.mp4` or `ID_000010_000020.mp4` (any video suffix) and lie anywhere below `root`, so
    `root/train/CLASS/`, `root/CLASS/` and `root/train/` are all found; where a name stands in several folders, that of
    the split or of the class is taken.

    Args:
        root: the folder of the videos.
        lists: csv files. One without a split column is of the split that its name holds (train, val, test).
        classes_file: names, one a line, in the order of the labels; alphabetical without it.

    Raises:
        UserError: a list is missing or lacks a column, a clip stands twice, or no listed file exists.
    """
    _check_root(root, "the videos of Kinetics", "*.tar*")
    entries: dict[tuple[str, int, int], _Row] = {}
    for file in lists:
        for key, row in _kinetics_rows(file):
            if key in entries:
                raise UserError(f"{row.where} repeats the clip {key[0]} of {entries[key].where}; list every clip once")
            entries[key] = row
    if not entries:
        raise UserError("the lists hold no clip; give the official csv files")
    labels = sorted({row.class_name for row in entries.values()})
    classes = tuple(labels) if classes_file is None else read_classes(classes_file)
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(f"the lists name the class {unknown[0]!r}, which {classes_file} does not; correct one")
    on_disk: dict[str, list[str]] = defaultdict(list)
    for path in _videos(root):
        on_disk[Path(path).stem].append(path)
    segments = Counter(video for video, _, _ in entries)
    found: list[tuple[str, _Row]] = []
    missing: list[tuple[str, _Row]] = []
    for (video, start, end), row in entries.items():
        full = f"{video}_{start:06d}_{end:06d}"
        paths = on_disk.get(full) or (on_disk.get(video, []) if segments[video] == 1 else [])
        if paths:
            found.append((_nearest(paths, row), row))
        else:
            missing.append((full, row))
    return _listing(root, found, missing, classes, ("kinetics", None))


def _kinetics_rows(file: Path) -> Iterable[tuple[tuple[str, int, int], _Row]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream)
            lacking = [column for column in _KINETICS_COLUMNS if column not in (table.fieldnames or ())]
            if lacking:
                raise UserError(
                    f"list {file} has no column {lacking[0]!r}; give a csv with the columns "
                    f"{', '.join(_KINETICS_COLUMNS)} (the official test lists have no labels)"
                )
            for line in table:
                where = f"{file} line {table.line_num}"
                word = line.get("split") or next((name for name in _KINETICS_SPLITS if name in file.stem), "")
                if word not in _KINETICS_SPLITS:
                    raise UserError(f"{where} has the split {word!r}; it must be one of {', '.join(_KINETICS_SPLITS)}")
                try:
                    times = int(float(line["time_start"])), int(float(line["time_end"]))
                except (TypeError, ValueError):
                    raise UserError(f"{where} has no times in seconds in time_start and time_end") from None
                if not line["label"] or not line["youtube_id"]:
                    raise UserError(f"{where} has an empty label or youtube_id")
                yield (line["youtube_id"], *times), _Row(_KINETICS_SPLITS[word], line["label"], where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"list {file} cannot be read ({error}); give the official csv files") from None


def _videos(root: Path) -> Iterator[str]:
    """Paths relative to `root` of all videos below it; one walk, whatever the layout.

    Raises:
        UserError: a folder cannot be listed: its videos would count as missing.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be listed ({error.strerror}); mend that and run again")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _nearest(paths: Sequence[str], row: _Row) -> str:
    wanted = {row.split, row.class_name, row.class_name.replace(" ", "_")}
    return max(paths, key=lambda path: len(wanted & set(Path(path).parts[:-1])))


def _check_split(split: int) -> None:
    if split not in SPLIT_NUMBERS:
        raise UserError(f"split is {split}; it can be 1, 2 or 3")


def _check_root(root: Path, what: str, archives: str) -> None:
    if not root.is_dir():
        raise UserError(f"source folder {root} does not exist; give the folder with {what}")
    packed = sorted(root.glob(archives))
    if packed and not any(entry.is_dir() for entry in root.iterdir()):
        tool = "unar" if packed[0].suffix == ".rar" else "tar -xf"
        raise UserError(
            f"source folder {root} holds {len(packed)} archives such as {packed[0].name} and no folder; "
            f"unpack each of them there first, for example with `{tool} {packed[0].name}`"
        )


def _add(rows: dict[str, _Row], relative: str, row: _Row) -> None:
    if relative in rows:
        raise UserError(f"{row.where} repeats {relative!r} of {rows[relative].where}; list every file once")
    rows[relative] = row


def _from_rows(
    root: Path, rows: Mapping[str, _Row], classes: tuple[str, ...], official: tuple[str, int]
) -> SourceListing:
    present = set(_videos(root))
    found = [(path, row) for path, row in rows.items() if path in present]
    missing = [(path, row) for path, row in rows.items() if path not in present]
    return _listing(root, found, missing, classes, official)


def _listing(
    root: Path,
    found: Sequence[tuple[str, _Row]],
    missing: Sequence[tuple[str, _Row]],
    classes: tuple[str, ...],
    official: tuple[str, int | None],
) -> SourceListing:
    if not found:
        raise UserError(
            f"none of the {len(missing)} listed clips exists below {root}, the first would be {missing[0][0]}; "
            "give the folder that holds them"
        )
    numbers = {name: number for number, name in enumerate(classes)}

    def clips(pairs: Iterable[tuple[str, _Row]]) -> tuple[SourceClip, ...]:
        return tuple(
            SourceClip(
                path=root / path,
                relative=path,
                split=row.split,
                label=numbers[row.class_name],
                class_name=row.class_name,
            )
            for path, row in pairs
        )

    return SourceListing(classes=classes, clips=clips(found), missing=clips(missing), official=official)
