"""The command `rev2net prepare {folder,list,ucf101,hmdb51,kinetics}`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import get_args

from dataloaders.classmap import read_class_map
from dataloaders.errors import UserError
from dataloaders.official import SPLIT_NUMBERS, read_hmdb51, read_kinetics, read_ucf101
from dataloaders.prepare import MISSING, QUARANTINE, PrepareReport, prepare, prepare_share
from dataloaders.reuse import open_donors
from dataloaders.shards import DataSet
from dataloaders.sources import SPLITS, SourceListing, read_folder, read_lists
from dataloaders.transcode import FLOW_SCALES, FlowDevice, PrepareSettings
from dataloaders.video import MINIMUM
from dataloaders.workers import cores

_SHOWN = 5
"""Bad clips and skipped files that the report names; the rest is counted."""

_GPU_WORKERS = 4
"""Processes that share a GPU unless --workers is given: each has its own context and about 2 GB of pictures."""

_FOLDER_HELP = """SOURCE holds a folder per class, or the folders train, val, test with a folder per class in each.

examples:
  rev2net prepare folder videos data
  rev2net prepare folder videos data --val-fraction 0.1 --size 352x256
  rev2net prepare folder videos data --codec vp9 --short-side 128     for machines without an NVIDIA GPU
"""

_LIST_HELP = """A list has one `path label` per line (`path,label` in a .csv; a tab between them allows for class
names with spaces), labels are numbers from 0 or names. SOURCE is the list of the
training clips (further splits by --val and --test), or a folder that holds train.txt and, if wanted, val.txt and
test.txt.

examples:
  rev2net prepare list lists/train.txt data --val lists/val.txt --root videos
  rev2net prepare list lists data --root videos --classes lists/names.txt
"""

_SPLIT_HELP = """SOURCE is the folder of the class folders, as they come out of the official archives. The test list
of the split becomes the split val.

examples:
  rev2net prepare {name} {folder} data/{name}-1 --annotations {lists} --split 1
  rev2net prepare {name} {folder} data/{name}-2 --annotations {lists} --split 2 --reuse data/{name}-1
  rev2net prepare {name} {folder} data/{name}-16 --annotations {lists} --class-map configs/classes/ucf_hmdb_16.yaml
"""

_KINETICS_HELP = """SOURCE is the folder of the videos, ID.mp4 or ID_000010_000020.mp4, in any folders below it. The
lists are the official csv files of Kinetics-400, -600 or -700 that have labels.

examples:
  rev2net prepare kinetics videos data/kinetics400 --annotations train.csv val.csv --max-missing 0.2
"""


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands and options of `rev2net prepare` to a parser."""
    parser.description = "Transcode videos, compute their optical flow, and pack both into tar shards."
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{folder,list,ucf101,hmdb51,kinetics}")
    plain = argparse.RawDescriptionHelpFormatter
    folder = kinds.add_parser("folder", help="a folder per class", description=_FOLDER_HELP, formatter_class=plain)
    folder.add_argument("source", type=Path, metavar="SOURCE", help="folder of the videos")
    lists = kinds.add_parser("list", help="lists of `path label`", description=_LIST_HELP, formatter_class=plain)
    lists.add_argument("source", type=Path, metavar="SOURCE", help="list of the training clips, or a folder of lists")
    lists.add_argument("--val", type=Path, metavar="LIST", help="list of the validation clips")
    lists.add_argument("--test", type=Path, metavar="LIST", help="list of the test clips")
    lists.add_argument("--root", type=Path, help="folder that the paths are relative to (the list's own)")
    lists.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, in the order of labels")
    for kind, fraction in ((folder, 0.2), (lists, 0.0)):
        kind.add_argument("out", type=Path, metavar="OUT", help="folder to make")
        kind.add_argument(
            "--val-fraction",
            type=float,
            default=fraction,
            metavar="SHARE",
            help="share of each class that becomes the split val where none is given (%(default)s)",
        )
        _add_common(kind)
    for name, videos, official in (
        ("ucf101", "UCF-101", "ucfTrainTestlist"),
        ("hmdb51", "hmdb51", "testTrainMulti_7030_splits"),
    ):
        text = _SPLIT_HELP.format(name=name, folder=videos, lists=official)
        kind = kinds.add_parser(name, help="its official layout", description=text, formatter_class=plain)
        kind.add_argument("source", type=Path, metavar="SOURCE", help="folder of the class folders")
        kind.add_argument("out", type=Path, metavar="OUT", help="folder to make")
        kind.add_argument("--annotations", type=Path, required=True, metavar="FOLDER", help=f"the folder {official}")
        kind.add_argument("--split", type=int, default=1, choices=SPLIT_NUMBERS, help="official split (%(default)s)")
        _add_common(kind)
    kinetics = kinds.add_parser(
        "kinetics", help="its official csv lists", description=_KINETICS_HELP, formatter_class=plain
    )
    kinetics.add_argument("source", type=Path, metavar="SOURCE", help="folder of the videos")
    kinetics.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    kinetics.add_argument("--annotations", type=Path, required=True, nargs="+", metavar="CSV", help="official lists")
    kinetics.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one a line, in the order of labels (alphabetical)"
    )
    _add_common(kinetics)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec",
        choices=list(MINIMUM),
        default="h264",
        help="vp9: DALI decodes it on a CPU also (%(default)s)",
    )
    parser.add_argument("--fps", default="25", help="constant frame rate, or `source` (%(default)s)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short-side", type=int, default=None, metavar="PIXELS", help="multiple of 16 (256)")
    size.add_argument("--size", metavar="WxH", help="one size for all clips, such as 352x256")
    parser.add_argument(
        "--flow-scale", type=float, choices=FLOW_SCALES, default=0.5, help="size of flow to RGB (%(default)s)"
    )
    parser.add_argument(
        "--flow-device",
        choices=get_args(FlowDevice),
        default="cpu",
        help="where TV-L1 runs (%(default)s)",
    )
    parser.add_argument("--no-flow", action="store_true", help="store no flow")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the validation share (%(default)s)")
    parser.add_argument("--shard-mb", type=float, default=256, metavar="MB", help="size of a shard (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes (the number of cores it may use; with cuda at most 4)"
    )
    parser.add_argument(
        "--share",
        metavar="I/N",
        help="transcode only the I-th of N parts, for several machines on one folder; then run without",
    )
    parser.add_argument(
        "--reuse",
        nargs="+",
        default=(),
        metavar="DATA",
        help="data sets of the same videos and settings, of other splits or classes: what they hold is not done again",
    )
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the clips that may be bad; one always may, except with 0 (%(default)s)",
    )
    parser.add_argument(
        "--max-missing",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the listed clips that the disk may lack (%(default)s)",
    )
    parser.add_argument(
        "--class-map",
        type=Path,
        metavar="YAML",
        help="keep and rename classes, such as configs/classes/ucf_hmdb_16.yaml",
    )


def run_prepare(args: argparse.Namespace) -> int:
    """Run `rev2net prepare`; returns the exit status, raises UserError for a user's mistake."""
    start = time.monotonic()
    settings = read_settings(args)
    settings.check()
    reuse = open_donors(args.reuse, settings)
    share = None if args.share is None else _share(args.share)
    listing = read_listing(args)
    workers = args.workers
    if workers is None:
        workers = min(_GPU_WORKERS, len(cores())) if settings.flow_device == "cuda" else len(cores())
    if share is not None:
        clips, bad = prepare_share(
            listing, args.out, settings, share, workers=workers, max_missing=args.max_missing, reuse=reuse
        )
        print(
            f"{args.out}: share {args.share} is done in {time.monotonic() - start:.0f} s: {clips} clips, "
            f"{len(bad)} of them bad; when all shares are, the same command without --share makes the shards"
        )
        return 0
    report = prepare(
        listing,
        args.out,
        settings,
        workers=workers,
        max_bad=args.max_bad,
        max_missing=args.max_missing,
        reuse=reuse,
    )
    return _tell(report, listing, args, time.monotonic() - start)


def read_settings(args: argparse.Namespace) -> PrepareSettings:
    """The settings that the arguments name, not yet checked; raises UserError for words that are none."""
    size = None if args.size is None else _size(args.size)
    short_side = 256 if args.short_side is None else args.short_side
    return PrepareSettings(
        codec=args.codec,
        fps=_fps(args.fps),
        short_side=None if size else short_side,
        size=size,
        flow_scale=None if args.no_flow else args.flow_scale,
        flow_device=args.flow_device,
        seed=args.seed,
        shard_bytes=_shard_bytes(args.shard_mb),
    )


def _shard_bytes(megabytes: float) -> int:
    if not 0 < megabytes <= 2**20:
        raise UserError(f"--shard-mb is {megabytes:g}; give a number above 0, up to {2**20}")
    return int(megabytes * 2**20)


def _share(text: str) -> tuple[int, int]:
    words = text.split("/")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise UserError(f"--share is {text!r}; give I/N, such as 3/64 for the third of 64 parts")
    return int(words[0]), int(words[1])


def _fps(text: str) -> Fraction | None:
    if text == "source":
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--fps is {text!r}; give a number such as 25 or 30000/1001, or `source`") from error


def _size(text: str) -> tuple[int, int]:
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise UserError(f"--size is {text!r}; give width and height in pixels, such as 352x256")
    return int(words[0]), int(words[1])


def read_listing(args: argparse.Namespace) -> SourceListing:
    """The clips that the arguments name; raises UserError where they name none."""
    listing = _listing(args)
    return listing if args.class_map is None else read_class_map(args.class_map).apply(listing)


def _listing(args: argparse.Namespace) -> SourceListing:
    source: Path = args.source
    if args.kind == "folder":
        _refuse_inside(args.out, source)
        return read_folder(source, val_fraction=args.val_fraction, seed=args.seed)
    if args.kind == "ucf101":
        return read_ucf101(source, args.annotations, args.split)
    if args.kind == "hmdb51":
        return read_hmdb51(source, args.annotations, args.split)
    if args.kind == "kinetics":
        return read_kinetics(source, args.annotations, args.classes)
    lists: dict[str, Path] = {}
    if source.is_dir():
        lists = {s: source / f"{s}.txt" for s in SPLITS if (source / f"{s}.txt").is_file()}
        if "train" not in lists:
            raise UserError(f"folder {source} holds no train.txt; give a list, or a folder that holds one")
    else:
        lists["train"] = source
    lists.update({split: file for split, file in (("val", args.val), ("test", args.test)) if file is not None})
    if "val" in lists and args.val_fraction > 0:
        raise UserError("--val-fraction is given beside a list of the split val; give only one of them")
    root = args.root if args.root is not None else lists["train"].parent
    if not root.is_dir():
        raise UserError(f"--root {root} does not exist; give the folder that the lists' paths are relative to")
    return read_lists(lists.items(), root, classes_file=args.classes, val_fraction=args.val_fraction, seed=args.seed)


def _refuse_inside(out: Path, source: Path) -> None:
    """UserError for an OUT that the next run would take for a class of SOURCE."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"OUT {out} lies in SOURCE {source}, whose folders are classes; give a folder outside of it")


def _absent_classes(listing: SourceListing, bad: set[str]) -> Iterator[str]:
    """A sentence for each split that has no clip of some classes."""
    good = [clip for clip in listing.clips if clip.relative not in bad]
    for split in sorted({clip.split for clip in listing.clips}):
        there = {clip.label for clip in good if clip.split == split}
        absent = [name for label, name in enumerate(listing.classes) if label not in there]
        if absent:
            names = ", ".join(absent[:_SHOWN]) + (", …" if len(absent) > _SHOWN else "")
            verb = "class has" if len(absent) == 1 else "classes have"
            yield f"{len(absent)} {verb} no clip in the split {split}: {names}"


def _tell(report: PrepareReport, listing: SourceListing, args: argparse.Namespace, seconds: float) -> int:
    bad = report.quarantined
    for entry in bad[:_SHOWN]:
        print(f"quarantined {entry.file}: {entry.reason}", file=sys.stderr)
    if len(bad) > _SHOWN:
        print(f"… and {len(bad) - _SHOWN} more, see {args.out / QUARANTINE}", file=sys.stderr)
    if listing.skipped:
        names = ", ".join(listing.skipped[:_SHOWN]) + (", …" if len(listing.skipped) > _SHOWN else "")
        print(f"skipped {len(listing.skipped)} files that are no videos by name: {names}", file=sys.stderr)
    for told in _absent_classes(listing, {entry.file for entry in bad}):
        print(told, file=sys.stderr)
    if listing.missing:
        print(f"{len(listing.missing)} listed clips are not on the disk, see {args.out / MISSING}", file=sys.stderr)
    if not report.finished:
        print(
            f"{len(bad)} of {len(listing.clips)} clips are bad, more than --max-bad {args.max_bad:g} allows; "
            f"allow more (the good clips are kept in {args.out} and not done again); a source that is mended after "
            f"that goes into another folder with --reuse {args.out}, which takes over what did not change",
            file=sys.stderr,
        )
        return 1
    data = DataSet.open(args.out)
    counts = ", ".join(f"{split} {count}" for split, count in report.prepared.items())
    shards = [shard for entry in data.manifest["splits"].values() for shard in entry["shards"]]
    sizes = data.manifest["video"]["sizes"]
    print(
        f"{args.out}: {'prepared before, nothing to do' if report.already else f'prepared in {seconds:.0f} s'}: "
        f"{sum(report.prepared.values())} clips ({counts}), {len(data.classes)} classes, {len(shards)} shards, "
        f"{sum(shard['bytes'] for shard in shards) / 2**20:.1f} MB, {len(listing.missing)} missing, "
        f"{len(bad)} quarantined, "
        f"{len(sizes)} picture size{'s' if len(sizes) > 1 else ''} ({', '.join(list(sizes)[:_SHOWN])})"
    )
    return 0
