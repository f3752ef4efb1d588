"""`rev2net predict`: what a video shows, for any file that FFmpeg reads, over time where it is long."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor
from tqdm import tqdm

from dataloaders.errors import DecodeError, UserError, first_line
from dataloaders.plan import Views
from dataloaders.transcode import PrepareSettings
from dataloaders.windows import Window, open_video, windows
from rev2net.distributed import own_device
from rev2net.export import Description, Scorer, is_exported, read_exported

_HELP = """The classes that videos show, by a checkpoint's test-time network or an exported one.

A video is scored in windows of --window seconds; the score of a window is the mean over its test views, that of the
video the mean over its windows. A video shorter than a window is scored as `rev2net eval` does.

examples:
  rev2net predict runs/demo/checkpoints/best video.mp4
  rev2net predict demo.onnx clips/*.avi --json > predictions.jsonl       a line per video
  rev2net predict runs/kinetics match.mkv --window 5 --every 1 --views 1x1
  rev2net predict runs/demo video.mp4 --annotate annotated/              a copy with the classes written into it
"""


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net predict`."""
    parser.description = _HELP
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's output folder, a checkpoint, or an exported .pt2 or .onnx file",
    )
    parser.add_argument("videos", metavar="VIDEO", nargs="+", type=Path)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes that are told (default: %(default)s)")
    parser.add_argument("--window", type=float, default=10.0, metavar="S", help="seconds (default: %(default)s)")
    parser.add_argument("--every", type=float, metavar="S", help="seconds between windows' starts (default: --window)")
    parser.add_argument("--views", help="of a window, CLIPSxCROPS or whole (default: the run's own eval.views)")
    parser.add_argument("--batch", type=int, default=4, help="clips of one forward pass (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of a checkpoint's network (default: %(default)s); an exported one is fp32",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and video, on standard output")
    parser.add_argument("--annotate", metavar="FOLDER", type=Path, help="write copies with the classes in the picture")
    parser.add_argument("--overwrite", action="store_true", help="replace copies that --annotate finds there")


@dataclass(frozen=True, slots=True)
class Scored:
    """Mean softmax scores of a piece of a video, by class."""

    start: float
    end: float
    scores: Tensor

    def top(self, classes: Sequence[str], k: int) -> list[tuple[str, float]]:
        """The `k` classes with the highest scores, highest first."""
        found = self.scores.topk(min(k, len(classes)))
        return [(classes[i], score) for score, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)]


@dataclass(slots=True)
class Prediction:
    """Of one video.

    Attributes:
        windows: in order of time.
        damage: why only a part of the video is scored, or None.
    """

    windows: list[Scored] = field(default_factory=list)
    damage: str | None = None

    @property
    def whole(self) -> Scored:
        """The mean over the windows."""
        scores = torch.stack([window.scores for window in self.windows]).mean(0)
        return Scored(self.windows[0].start, self.windows[-1].end, scores)


@dataclass(slots=True)
class Predictor:
    """A network that scores windows, and the seconds that it took."""

    scorer: Scorer
    description: Description
    views: Views
    batch: int
    device: torch.device
    precision: str = "fp32"
    seconds: float = 0.0

    @classmethod
    def open(cls, path: str, views: str | None, batch: int, precision: str = "fp32") -> Predictor:
        """From a checkpoint or an exported file.

        Raises:
            UserError: there is none, or views or a precision that it cannot take.
        """
        if is_exported(path):
            device = torch.device("cpu")
            scorer, description = read_exported(Path(path))
        else:
            from rev2net import checkpoint
            from rev2net.evaluate import for_testing

            device = own_device()
            network, config, state = checkpoint.load_encoder(checkpoint.find(path))
            scorer, description = for_testing(network, device), Description.of(config, state)
        chosen = views or description.views
        if chosen == "whole" and (is_exported(path) or description.segments):
            raise UserError(f"views `whole` take every frame, and {path} a fixed number: give --views 1x1 or 10x3")
        if is_exported(path) and precision != "fp32":
            raise UserError(f"--precision {precision} needs a checkpoint: {path} computes in fp32, as it was exported")
        return cls(scorer, description, Views.parse(chosen), batch, device, precision)

    def score(self, window: Window) -> Scored:
        """Mean softmax score over the window's views."""
        from rev2net.evaluate import autocast

        total: Any = 0.0
        count = 0
        stream = self.description.input
        for clips in window.clips(self.description.shape, self.views, stream, batch=self.batch, device=self.device):
            begin = time.perf_counter()
            with torch.inference_mode(), autocast(self.device, self.precision):
                total += self.scorer(clips).float().softmax(1).double().sum(0).cpu()
            self.seconds += time.perf_counter() - begin
            count += len(clips)
        if not total.isfinite().all():
            raise UserError(
                f"the network's scores are not finite in {self.precision}: give --precision fp32, or another checkpoint"
            )
        return Scored(window.start, window.end, total / count)


def run_predict(args: argparse.Namespace) -> int:
    """`rev2net predict`."""
    every = args.window if args.every is None else args.every
    for name, value in (("--window", args.window), ("--every", every), ("--top", args.top), ("--batch", args.batch)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} {value:g} is not possible: give a number above 0")
    if args.annotate is not None:
        _check_copies(args.annotate, args.videos, overwrite=args.overwrite)
    predictor = Predictor.open(args.checkpoint, args.views, args.batch, args.precision)
    if args.annotate is not None:
        _make(args.annotate)
    begin, seconds, failed = time.perf_counter(), 0.0, 0
    for video in args.videos:
        prediction = _predict(predictor, video, args, every)
        classes = predictor.description.classes
        unwritten = None
        if args.json:
            print(_json(video, prediction, classes, args.top), flush=True)
        if prediction.windows:
            seconds += prediction.windows[-1].end
            if args.annotate is not None:
                unwritten = _annotated(video, args.annotate / f"{video.stem}.mp4", prediction, classes)
        troubles = [text for text in (prediction.damage, unwritten) if text is not None]
        failed += bool(troubles)
        for text in troubles:
            print(f"rev2net predict: {text}", file=sys.stderr, flush=True)
    spent = time.perf_counter() - begin
    if seconds:
        print(
            f"{seconds:.1f} s of video in {spent:.1f} s ({seconds / spent:.2g} times real time), the network "
            f"{predictor.seconds / spent:.0%} of it",
            file=sys.stderr,
        )
    return 2 if failed else 0


def _annotated(video: Path, copy: Path, prediction: Prediction, classes: Sequence[str]) -> str | None:
    """Write the copy; why the encoder does not take the video."""
    from rev2net.annotate import annotate

    try:
        annotate(video, copy, prediction.windows, classes)
    except (av.error.FFmpegError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # the next copy would fail as well
            raise
        return f"{copy} cannot be written ({getattr(error, 'strerror', None) or first_line(error)})"
    return None


def _predict(predictor: Predictor, video: Path, args: argparse.Namespace, every: float) -> Prediction:
    """All windows of a video, told as they come unless as JSON."""
    prediction = Prediction()
    settings = PrepareSettings.from_json(predictor.description.preparation)
    try:
        with open_video(video) as source:
            bar = tqdm(total=source.seconds, unit="s", desc=video.name, leave=False, disable=None, file=sys.stderr)
            if not args.json:
                print(video)
            with bar:
                for window in windows(source, settings, key=str(video), seconds=args.window, every=every):
                    scored = predictor.score(window)
                    prediction.windows.append(scored)
                    bar.update(min(window.end, bar.total or window.end) - bar.n)
                    if not args.json:
                        tqdm.write(_line(scored, predictor.description.classes, args.top))
    except DecodeError as error:
        part = f"; the first {prediction.windows[-1].end:.1f} s are scored" if prediction.windows else ""
        prediction.damage = f"{video} cannot be read: {error.reason}{part}"
    if len(prediction.windows) > 1 and not args.json:
        print(_line(prediction.whole, predictor.description.classes, args.top) + "   (mean of the windows)")
    return prediction


def _line(scored: Scored, classes: Sequence[str], k: int) -> str:
    told = "   ".join(f"{name} {score:.1%}" for name, score in scored.top(classes, k))
    return f"  {scored.start:7.1f} - {scored.end:7.1f} s   {told}"


def _json(video: Path, prediction: Prediction, classes: Sequence[str], k: int) -> str:
    def told(scored: Scored) -> dict[str, Any]:
        top = [{"class": name, "score": round(score, 6)} for name, score in scored.top(classes, k)]
        return {"start": round(scored.start, 3), "end": round(scored.end, 3), "top": top}

    tree: dict[str, Any] = {"video": str(video)}
    if prediction.windows:
        tree |= told(prediction.whole)
        tree["windows"] = [told(window) for window in prediction.windows]
    if prediction.damage is not None:
        tree["error"] = prediction.damage
    return json.dumps(tree)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--annotate {folder} cannot be made a folder ({error.strerror}): give another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--annotate {folder} is a folder in which you may not write: give another")


def _check_copies(folder: Path, videos: Sequence[Path], *, overwrite: bool) -> None:
    """UserError before anything is computed: a copy would replace another, or a file that is to stay."""
    copies: dict[Path, Path] = {}
    for video in videos:
        copy = folder / f"{video.stem}.mp4"
        other = copies.setdefault(copy, video)
        if other != video:
            raise UserError(f"{copy} would be written for {video} and for {other}: give each a folder of its own")
        if copy.resolve() == video.resolve():
            raise UserError(f"--annotate {folder} is where {video} lies, which its copy would replace: give another")
        if os.path.isdir(copy):  # where the name is too long, it is not
            raise UserError(f"{copy} would be written, and is a folder: give another --annotate")
        if os.path.exists(copy) and not overwrite:
            raise UserError(f"{copy} is there: give --overwrite to replace such copies, or another folder")
