"""Pictures of what was learned, as matplotlib figures for MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dataloaders.batch import ClipBatch
from dataloaders.flow.colours import flow_colours
from rev2net.grid import Point, Result
from rev2net.models.heads import Network


def confusion_matrix(counts: npt.NDArray[np.int64], classes: tuple[str, ...], title: str) -> Figure:
    """Rows are true classes, colours are shares of the row; counts are written where there is room."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = min(12.5, max(5.0, 0.35 * len(classes) + 2.5))
    # Not through pyplot, which would keep every figure of a long run.
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="none")
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if len(classes) <= 120:
        size = 10 if len(classes) <= 60 else 5.5
        # A class may be called anything, $ for a formula included.
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, fontsize=size, parse_math=False)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour)
    figure.colorbar(image, shrink=0.7, label="share of the class")
    return figure


Curve = Sequence[tuple[int, float]]
"""Step and value, in the order of the steps."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""

_INFINITE = 1e300
"""MLflow's databases keep an infinite value as the largest number that they know."""

_POINTS = 200
"""A curve with more is drawn as so many means of equal parts."""


def learning_curves(panels: Mapping[str, Mapping[tuple[str, int], Curve]]) -> Figure:
    """A panel for each quantity, a line for each (seed, split): the colour is the seed, the dashes are the split."""
    lines = sorted({line for curves in panels.values() for line in curves})
    seeds = sorted({seed for seed, _ in lines})
    figure = Figure(figsize=(3.0 * len(panels), 2.6 + 0.2 * -(-len(lines) // 3)), layout="constrained")
    shown = {}
    for (title, curves), axes in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for (seed, split), curve in curves.items():
            points = _thinned([(step, value) for step, value in curve if abs(value) < _INFINITE])
            (shown[seed, split],) = axes.plot(
                *np.array(points).reshape(-1, 2).T,
                color=_COLOURS[seeds.index(seed) % len(_COLOURS)],
                linestyle=("-", "--", ":")[(split - 1) % 3],
                marker="o" if len(points) < 20 else None,
                markersize=3,
            )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    names = [f"seed {seed}, split {split}" for seed, split in lines]
    figure.legend([shown[line] for line in lines], names, loc="outside lower left", ncols=3, frameon=False)
    return figure


def _thinned(curve: Curve) -> Curve:
    if len(curve) <= _POINTS:
        return curve
    return [tuple(np.mean(part, axis=0)) for part in np.array_split(np.array(curve), _POINTS)]


@torch.no_grad()
def decoders(network: Network, batch: ClipBatch, title: str, columns: int = 8) -> Figure:
    """The first clip of a batch: input frames, reversed-frame reconstruction, target and predicted flow.

    Flow in the usual colour wheel (hue = direction, saturation = speed), both rows on one scale.
    """
    network.eval()
    video = batch.stream("rgb")
    output = network.heads(video[:1])
    picked = np.linspace(0, video.shape[2] - 1, columns).round().astype(int).tolist()
    rows: list[tuple[str, list[Tensor]]] = [("input", [_picture(video[0, :, t]) for t in picked])]
    if output.frames is not None:
        # Turned round again, so that each reconstruction stands under the frame that it should be.
        frames = output.frames[0].flip(1)
        rows.append(("reconstruction\n(turned round)", [_picture(frames[:, t]) for t in picked]))
    if output.flow is not None and batch.flow is not None:
        scale = float(batch.flow[0, :, picked].norm(dim=0).quantile(0.98).clamp_min(1e-3))
        for name, flow in (("target flow", batch.flow[0]), ("predicted flow", output.flow[0])):
            rows.append((name, [flow_colours(flow[:, t], scale) for t in picked]))
    figure = Figure(figsize=(1.5 * columns, 1.6 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.suptitle(title)
    for (name, pictures), line in zip(rows, axes, strict=True):
        for t, picture, axis in zip(picked, pictures, line, strict=True):
            axis.imshow(picture.permute(1, 2, 0).cpu().numpy())
            axis.set(xticks=[], yticks=[])
            if name == "input":
                axis.set_title(f"frame {t}", fontsize=8)
        line[0].set_ylabel(name, fontsize=9)
    return figure


def weights(names: Sequence[str], results: Mapping[Point, Result], winner: Point) -> Figure:
    """Accuracy of the runs of a search over each weight, the winner's ringed; crosses for runs that failed."""
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    (line,) = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for place, (name, axes) in enumerate(zip(names, line, strict=True)):
        for failed, marker in ((False, "o"), (True, "x")):
            points = [point for point, result in results.items() if (result.failure is not None) == failed]
            axes.plot([p[place] for p in points], [results[p].top1 for p in points], marker, alpha=0.5)
        axes.plot(winner[place], results[winner].top1, "o", markersize=14, fillstyle="none", color="black")
        axes.set_xscale("symlog", linthresh=1e-5)
        axes.set(title=f"{name} = {winner[place]:g}", xlabel=name)
    line[0].set_ylabel("top-1 of the clips held out")
    return figure


def _picture(frame: Tensor) -> Tensor:
    return ((frame.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
