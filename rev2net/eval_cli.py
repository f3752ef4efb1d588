"""`rev2net eval` and `rev2net splits`: test checkpoints, one stream or two, one split or the three official ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, TextIO

from torch import nn

from dataloaders.batch import ClipBatch
from dataloaders.errors import UserError, first_line
from dataloaders.loader import EvalLoader
from dataloaders.progress import Progress
from dataloaders.shards import DataSet, check_output, write_atomically
from rev2net.distributed import Ranks, join, read_ranks

if TYPE_CHECKING:  # rev2net.config brings torchvision, which takes seconds that a mistyped command should not
    from rev2net.checkpoint import RunState
    from rev2net.config import Config
    from rev2net.evaluate import Metrics, Scores
    from rev2net.evaluation_log import EvaluationLog

_EVAL = """Accuracy of a checkpoint's test-time network (the encoder alone). Every video counts exactly once.

examples:
  rev2net eval runs/demo data
  rev2net eval runs/demo/checkpoints/step-00000300 data --views 10x3 --split val
  rev2net eval runs/i3d-rgb data --fuse runs/i3d-flow         two streams: the mean of their softmax scores
  rev2net eval runs/demo data --backwards --json metrics.json
  rev2net eval runs/demo data --scores scores.jsonl           every video's scores, a line of JSON for each
  rev2net eval runs/i3d-rgb data --fuse runs/i3d-flow --log   kept in MLflow, for `rev2net report`
"""

_SPLITS = """Accuracy of several runs, each on the validation split that it was trained beside, and the mean: the
protocol of UCF101 and HMDB51, whose results are means over three official splits.

examples:
  rev2net splits runs/ucf101-imagenet/tsn-rgb-1 runs/ucf101-imagenet/tsn-rgb-2 runs/ucf101-imagenet/tsn-rgb-3
  rev2net splits runs/ucf101-imagenet/tsn-rgb-{1,2,3} --fuse runs/ucf101-imagenet/tsn-flow-{1,2,3} --log
"""


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net eval`."""
    parser.description = _EVAL
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
    parser.add_argument("data", metavar="DATA", help="folder that `rev2net prepare` made, or its URL")
    parser.add_argument("--fuse", metavar="CHECKPOINT", help="a second stream, whose scores are averaged in")
    parser.add_argument("--split", default="val")
    _add_protocol(parser)
    parser.add_argument("--backwards", action="store_true", help="play every clip backwards")
    parser.add_argument("--confusion", metavar="FILE.png", help="write the confusion matrix as a picture")
    parser.add_argument(
        "--json", metavar="FILE", help="write metrics, each class's too, and confusion matrix; - for standard output"
    )
    parser.add_argument(
        "--scores", metavar="FILE.jsonl", help="write every video's source, label, prediction and scores"
    )


def add_splits_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net splits`."""
    parser.description = _SPLITS
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="one run for each split")
    parser.add_argument("--fuse", metavar="CHECKPOINT", nargs="+", help="the second streams, in the same order")
    _add_protocol(parser)


def _add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--views", default="10x3", help="CLIPSxCROPS or whole (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="clips of one forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--backend", choices=("auto", "dali", "pyav"), default="auto")
    parser.add_argument("--log", action="store_true", help="keep the result in the trainings' MLflow store")


@dataclass(frozen=True, slots=True)
class _Stream:
    """A checkpoint's test-time network, ready to be tested, and under which configuration."""

    checkpoint: Path
    network: nn.Module
    config: Config
    state: RunState

    @classmethod
    def load(cls, path: str, args: argparse.Namespace, ranks: Ranks) -> _Stream:
        """From what the user gave.

        Raises:
            UserError: no checkpoint, or views that its network cannot take.
        """
        from rev2net import checkpoint
        from rev2net.evaluate import for_testing

        if args.batch < 1:
            raise UserError(f"--batch {args.batch} is not possible: give 1 or more")
        found = checkpoint.find(path)
        network, config, state = checkpoint.load_encoder(found)
        if args.views == "whole" and config.data.segments:
            raise UserError(f"--views whole takes every frame, but {found} samples segments: use 1x1 or 10x3")
        updates = {
            "eval": config.eval.model_copy(update={"views": args.views, "batch": args.batch}),
            "loader": config.loader.model_copy(update={"backend": args.backend}),
            "train": config.train.model_copy(update={"precision": args.precision}),
        }
        return cls(found, for_testing(network, ranks.device), config.model_copy(update=updates), state)

    def check(self, data: DataSet) -> None:
        """UserError where the data set has other classes, or lacks the stream that the network sees."""
        known = self.state.classes
        if data.classes != known:
            raise UserError(
                f"{self.checkpoint} knows {len(known)} classes ({', '.join(known[:3])}, ...) and "
                f"{data.location} has {len(data.classes)} ({', '.join(data.classes[:3])}, ...): evaluate on data "
                "prepared with the same classes"
            )
        if self.config.model.input == "flow" and not data.has_flow:
            raise UserError(
                f"{self.checkpoint} sees optical flow, but {data.location} was prepared without: prepare it again "
                "without --no-flow"
            )
        theirs = data.official or {}
        for ours in (self.state.official, self.state.target_official):
            if ours.get("lists") == theirs.get("lists") and ours.get("split") != theirs.get("split"):
                raise UserError(
                    f"{self.checkpoint} was trained on the official split {ours.get('split')}, and {data.location} is "
                    f"of split {theirs.get('split')}, whose test videos it has learned from: test it on data of its "
                    "own split"
                )


def _check(streams: Sequence[_Stream], data: DataSet, split: str) -> None:
    """UserError where the streams do not fit each other, or the data not them."""
    from rev2net.data import a_difference

    data.shards(split)
    first, *others = streams
    for other in others:
        ours, theirs = first.state.classes, other.state.classes
        if theirs != ours:
            raise UserError(
                f"{first.checkpoint} knows {len(ours)} classes and {other.checkpoint} {len(theirs)}, "
                f"which differ in {a_difference(ours, theirs)!r}: fuse streams of the same classes"
            )
    for stream in streams:
        stream.check(data)


def _test(streams: Sequence[_Stream], data: DataSet, split: str, ranks: Ranks, *, backwards: bool = False) -> Scores:
    """Scores of one stream, or the mean of two, which `_check` has seen. A collective."""
    from rev2net.evaluate import fuse, split_scores

    scores = [
        split_scores(
            s.network, data, split, s.config, ranks, backwards=backwards, watched=_shown if ranks.first else iter
        )
        for s in streams
    ]
    return fuse(*scores) if len(scores) > 1 else scores[0]


def _shown(loader: EvalLoader) -> Iterator[ClipBatch]:
    with Progress(len(loader), "batch", "batches") as progress:
        for batch in loader:
            yield batch
            progress.step()


def _open_log(streams: Sequence[_Stream], data: DataSet, split: str) -> EvaluationLog:
    from rev2net.evaluation_log import EvaluationLog

    return EvaluationLog([(stream.checkpoint, stream.config, stream.state) for stream in streams], data, split)


def _ranks() -> Ranks:
    ranks = read_ranks()
    if ranks.world_size > 1:
        join(ranks, None)
    return ranks


def run_eval(args: argparse.Namespace) -> int:
    """`rev2net eval`."""
    from rev2net import pictures
    from rev2net.data import open_at
    from rev2net.evaluate import metrics, score_lines

    if args.log and args.backwards:
        raise UserError("--backwards is no test that is logged: leave it out, or --log")
    if args.confusion:
        check_output(Path(args.confusion), (".png", ".pdf", ".svg"))
    if args.json not in (None, "-") and (not Path(args.json).parent.is_dir() or Path(args.json).is_dir()):
        raise UserError(f"--json {args.json} is a folder, or in none: give a file in a folder that is there")
    if args.scores:
        check_output(Path(args.scores), (".jsonl",))
    ranks = _ranks()
    streams = [_Stream.load(path, args, ranks) for path in (args.checkpoint, args.fuse) if path is not None]
    data = open_at(args.data, streams[0].config)
    _check(streams, data, args.split)
    kept = _open_log(streams, data, args.split) if args.log else None
    scores = _test(streams, data, args.split, ranks, backwards=args.backwards)
    if not ranks.first:
        return 0
    result = metrics(scores, len(data.classes))
    names = " and ".join(str(stream.checkpoint) for stream in streams)
    where = sys.stderr if args.json == "-" else sys.stdout
    print(f"{names} on {args.data}, split {args.split}, views {args.views}: {result.videos} videos", file=where)
    values = result.named()
    for name, value in values.items():
        print(f"{name:<12}{value:>8.1%}", file=where)
    for sample, reason in result.failed.items():
        print(f"failed, counted as wrong: video {sample}: {reason}", file=where)
    unkept = None if kept is None else _keep(kept, result, where)
    if args.confusion:
        title = f"top-1 {result.top1:.1%} of {result.videos} videos"
        pictures.confusion_matrix(result.confusion, data.classes, title).savefig(args.confusion)
    if args.json:
        tree = {
            **values,
            "videos": result.videos,
            "failed": {str(k): v for k, v in result.failed.items()},
            **result.matrix(data.classes),
            **result.of_classes(),
        }
        text = json.dumps(tree)
        print(text) if args.json == "-" else Path(args.json).write_text(text)
    if args.scores:
        write_atomically(Path(args.scores), "".join(f"{line}\n" for line in score_lines(scores, data.classes)).encode())
    if unkept is not None:
        raise RuntimeError(unkept)
    return 0


def _keep(kept: EvaluationLog, result: Metrics, where: TextIO) -> str | None:
    """Write a test to MLflow; why that failed, which is told when everything else is done."""
    try:
        print(f"kept in MLflow at {kept.uri} as the run {kept.write(result)}", file=where)
    except Exception as error:  # of whatever keeps its data
        return f"the test is not kept in MLflow at {kept.uri} ({first_line(error)}): mend that, and test again"
    return None


def run_splits(args: argparse.Namespace) -> int:
    """`rev2net splits`."""
    from rev2net.data import open_at
    from rev2net.evaluate import metrics

    seconds = args.fuse or [None] * len(args.checkpoints)
    if len(seconds) != len(args.checkpoints):
        raise UserError(
            f"{len(args.checkpoints)} checkpoints cannot be fused with {len(seconds)}: give --fuse one for each split"
        )
    ranks = _ranks()
    tests: dict[object, tuple[str, list[_Stream], DataSet, EvaluationLog | None]] = {}
    for paths in zip(args.checkpoints, seconds, strict=True):
        streams = [_Stream.load(path, args, ranks) for path in paths if path is not None]
        config = streams[0].config
        data = open_at(config.data.path, config)
        # An official split or, where there are none, a data set; two of one are no mean over splits.
        which = config.data.split if data.official else data.fingerprint()
        if which in tests:
            raise UserError(
                f"{tests[which][0]} and {paths[0]} are tested on the same split: give one run for each split"
            )
        # Of all runs before the first test, which may take hours.
        _check(streams, data, config.data.val_split)
        kept = _open_log(streams, data, config.data.val_split) if args.log else None
        tests[which] = paths[0], streams, data, kept
    top1: list[float] = []
    unkept: str | None = None
    for path, streams, data, kept in tests.values():
        result = metrics(_test(streams, data, streams[0].config.data.val_split, ranks), len(data.classes))
        top1.append(result.top1)
        if ranks.first:
            print(f"{path:<40} {data.location:<30} top1 {result.top1:>7.1%} of {result.videos} videos")
            if kept is not None:
                unkept = _keep(kept, result, sys.stdout) or unkept
    if ranks.first:
        spread = f" +- {stdev(top1):.1%}" if len(top1) > 1 else ""
        print(f"mean of {len(top1)} splits: top1 {mean(top1):.1%}{spread}")
    if unkept is not None:
        raise RuntimeError(unkept)
    return 0
