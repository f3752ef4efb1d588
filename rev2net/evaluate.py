"""Test protocol: softmax scores averaged over a video's views; every video counts exactly once.

A video that cannot be decoded is not left out: it counts as wrong, and is listed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dataloaders.batch import ClipBatch, Stream
from dataloaders.loader import EvalLoader
from dataloaders.shards import DataSet
from rev2net.config import Config
from rev2net.data import eval_loader
from rev2net.distributed import Ranks
from rev2net.models.heads import Network

log = logging.getLogger("rev2net")

PIXELS = 20.0
"""Unit of the flow targets."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass at test time, as `train.precision` names it; parameters are float32 in each."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")


@dataclass(slots=True)
class Scores:
    """Softmax scores of some videos, summed over their views.

    Attributes:
        sums: sample index -> num_classes sums.
        views: sample index -> number of views seen.
        labels: sample index -> label.
        sources: sample index -> the source file's path, relative to the root that it was prepared from.
        failed: sample index -> (label, reason) of videos that could not be decoded.
    """

    sums: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    views: dict[int, int] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    failed: dict[int, tuple[int, str]] = field(default_factory=dict)

    def add(self, batch: ClipBatch, probabilities: Tensor) -> None:
        """Add the views of a batch; probabilities are N x num_classes."""
        rows = probabilities.double().cpu().numpy()
        for sample, label, source, row in zip(
            batch.sample.tolist(), batch.label.tolist(), batch.sources, rows, strict=True
        ):
            self.sums[sample] = self.sums.get(sample, 0.0) + row
            self.views[sample] = self.views.get(sample, 0) + 1
            self.labels[sample] = label
            self.sources[sample] = source

    def fail(self, sample: int, label: int, reason: str, source: str | None = None) -> None:
        """A video that could not be decoded: what some of its views scored does not count."""
        self.sums.pop(sample, None)
        self.failed[sample] = (label, reason)
        if source is not None:
            self.sources[sample] = source

    def means(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Sample indices (sorted), mean scores (videos x classes) and labels of the decodable videos."""
        samples = sorted(self.sums)
        means = np.stack([self.sums[s] / self.views[s] for s in samples]) if samples else np.zeros((0, 0))
        return np.array(samples, dtype=np.int64), means, np.array([self.labels[s] for s in samples], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Accuracy over a split.

    Attributes:
        top1, top5: share of the videos, in [0, 1]; a failed video counts as wrong.
        mean_class: accuracy of each class that has videos, averaged.
        cross_entropy: mean of -log of the averaged score of the true class, over the videos that did not fail; nats.
        videos: number of videos, failed ones included.
        failed: indices of the failed ones, with key and reason.
        confusion: classes x classes counts, rows are true labels; failed videos are in no column.
        class_videos: number of videos of each class, failed ones included but those whose label is not known.
    """

    top1: float
    top5: float
    mean_class: float
    cross_entropy: float
    videos: int
    failed: Mapping[int, str]
    confusion: npt.NDArray[np.int64]
    class_videos: tuple[int, ...]

    def named(self, prefix: str = "") -> dict[str, float]:
        """The three accuracies by name, after `prefix`."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("top1", "top5", "mean_class")}

    def matrix(self, classes: Sequence[str]) -> dict[str, Any]:
        """The confusion matrix with its classes' names, for JSON."""
        return {"classes": list(classes), "confusion": self.confusion.tolist()}

    def of_classes(self) -> dict[str, list[float | int | None]]:
        """Of each class its number of videos and the share of them that is right (None without videos), for JSON."""
        right = self.confusion.diagonal().tolist()
        shares = [hits / videos if videos else None for hits, videos in zip(right, self.class_videos, strict=True)]
        return {"class_videos": list(self.class_videos), "class_top1": shares}


def for_testing(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, in evaluation mode, its kernels laid out with their channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.to(device).parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return network.eval()


def metrics(scores: Scores, num_classes: int) -> Metrics:
    """Accuracy from the scores of all ranks together."""
    _, means, labels = scores.means()
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    totals = np.zeros(num_classes)
    top5, cross_entropy = 0, math.inf
    if len(labels):
        true = means[np.arange(len(labels)), labels]
        cross_entropy = float(-np.log(np.maximum(true, np.finfo(np.float32).tiny)).mean())
        ranked = np.argsort(-means, axis=1, kind="stable")
        np.add.at(confusion, (labels, ranked[:, 0]), 1)
        top5 = int((ranked[:, :5] == labels[:, None]).sum())
    # A sample whose label could not even be read (-1) is a wrong video of no class.
    known = [label for label, _ in scores.failed.values() if label >= 0]
    np.add.at(totals, np.concatenate([labels, known]).astype(int), 1)
    videos = len(labels) + len(scores.failed)
    present = totals > 0
    return Metrics(
        top1=float(confusion.trace() / max(1, videos)),
        top5=top5 / max(1, videos),
        mean_class=float((confusion.diagonal()[present] / totals[present]).mean()) if present.any() else 0.0,
        cross_entropy=cross_entropy,
        videos=videos,
        failed={sample: reason for sample, (_, reason) in scores.failed.items()},
        confusion=confusion,
        class_videos=tuple(map(int, totals)),
    )


def merge(parts: Iterable[Scores]) -> Scores:
    """All ranks' scores as one. No video may stand in two parts."""
    whole = Scores()
    for part in parts:
        assert not (whole.sums.keys() | whole.failed.keys()) & (part.sums.keys() | part.failed.keys())
        whole.sums |= part.sums
        whole.views |= part.views
        whole.labels |= part.labels
        whole.sources |= part.sources
        whole.failed |= part.failed
    return whole


@torch.no_grad()
def score(
    network: nn.Module,
    batches: Iterable[ClipBatch],
    *,
    device: torch.device,
    precision: str,
    stream: Stream = "rgb",
) -> Scores:
    """Scores of this rank's videos under a network in evaluation mode, which sees one stream of them."""
    network.eval()
    scores = Scores()
    for batch in batches:
        batch = batch.to(device, channels_last=True)
        with autocast(device, precision):
            logits = network(batch.stream(stream))
        scores.add(batch, logits.float().softmax(1))
    for sample in [s for s, row in scores.sums.items() if not np.isfinite(row).all()]:
        # Sorting would make class 0 of it.
        scores.fail(sample, scores.labels[sample], "the network's scores are not finite")
    return scores


def split_scores(
    network: nn.Module,
    data: DataSet,
    split: str,
    config: Config,
    ranks: Ranks,
    *,
    backwards: bool = False,
    watched: Callable[[EvalLoader], Iterable[ClipBatch]] = iter,
) -> Scores:
    """Scores of a split under `eval.views`; every rank gets those of all. A collective.

    Args:
        backwards: play every clip in reverse.
        watched: put around this rank's batches, by a caller that wants to see the progress.
    """
    with eval_loader(data, split, config, ranks, config.eval.views, backwards=backwards) as loader:
        scores = score(
            network,
            watched(loader),
            device=ranks.device,
            precision=config.train.precision,
            stream=config.model.input,
        )
    for failure in loader.failed:
        scores.fail(failure.sample, failure.label, f"{failure.key}: {failure.reason}", failure.source)
    whole = merge(ranks.gather(scores))
    for sample, (_, reason) in sorted(whole.failed.items()) if ranks.first else ():
        log.warning("video %d of %s counts as wrong: %s", sample, data.location, reason)
    return whole


def fuse(first: Scores, second: Scores) -> Scores:
    """Two streams: each video's score is the mean of the two streams' (paper, section 1; Simonyan et al. 2014).

    A video that failed in either counts as wrong.
    """
    fused = Scores(failed=first.failed | second.failed, sources=first.sources | second.sources)
    for sample in first.sums.keys() & second.sums.keys():
        fused.sums[sample] = first.sums[sample] / first.views[sample] + second.sums[sample] / second.views[sample]
        fused.views[sample] = 2
        fused.labels[sample] = first.labels[sample]
    return fused


def score_lines(scores: Scores, classes: Sequence[str]) -> Iterator[str]:
    """A JSON object for each video, in the data set's order, to compare, fuse or look through elsewhere.

    With `video` (its index in the split), `source`, `label`, `predicted` and `scores` (of the classes in their order,
    the mean of the softmax over the views, six digits). One that failed has `error` in place of `scores`, null for
    `predicted`, and for `label` and `source` where its sample cannot be read.
    """
    samples, means, labels = scores.means()
    lines: dict[int, dict[str, Any]] = {}
    for sample, (label, reason) in scores.failed.items():
        known = classes[label] if label >= 0 else None
        lines[sample] = {"label": known, "predicted": None, "error": reason}
    for sample, row, label in zip(samples.tolist(), means, labels, strict=True):
        told = {"label": classes[label], "predicted": classes[int(row.argmax())]}
        lines[sample] = told | {"scores": [float(f"{value:.6g}") for value in row]}
    for sample in sorted(lines):
        yield json.dumps({"video": sample, "source": scores.sources.get(sample), **lines[sample]})


@torch.no_grad()
def decoder_errors(network: Network, batches: Iterable[ClipBatch], *, ranks: Ranks, precision: str) -> dict[str, float]:
    """How well the decoders do on unseen clips, each beside what knowing nothing would give.

    Returns:
        flow_epe and flow_epe_zero: mean end-point error of the predicted flow and of zero flow, flow_rmse and
        flow_rmse_zero: a clip's root mean square of it, all in pixels of the resized clip; frame_rmse and
        frame_rmse_mean: a clip's root mean square error of the reconstruction and of its mean frame, on [-1, 1].
        Means over the clips, of the decoders that the network has.
    """
    network.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        batch = batch.to(ranks.device, channels_last=True)
        with autocast(ranks.device, precision):
            output = network.heads(batch.stream("rgb"))
        errors: dict[str, Tensor] = {}
        if output.flow is not None and batch.flow is not None:
            for suffix, difference in (("", output.flow - batch.flow), ("_zero", batch.flow)):
                distance = difference.norm(dim=1).flatten(1) * PIXELS
                errors[f"flow_epe{suffix}"] = distance.mean(1)
                errors[f"flow_rmse{suffix}"] = distance.square().mean(1).sqrt()
        if output.frames is not None:
            target = batch.stream("rgb").flip(2)
            mean_frame = target.mean(2, keepdim=True)
            errors["frame_rmse"] = (output.frames - target).flatten(1).square().mean(1).sqrt()
            errors["frame_rmse_mean"] = (mean_frame - target).flatten(1).square().mean(1).sqrt()
        for name, values in errors.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
        count += len(batch)
    parts = ranks.gather((sums, count))
    total = sum(n for _, n in parts)
    names = sorted({name for part, _ in parts for name in part})
    return {name: sum(part.get(name, 0.0) for part, _ in parts) / total for name in names}
