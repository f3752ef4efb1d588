"""The paper's coarse-to-fine grids over the loss weights: which runs there are, and which one wins.

Nothing is trained here. The grids are a function of the results so far, so that all who know the same results, on
whatever machine and after whatever kill, go on with the same runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from dataloaders.errors import UserError
from rev2net.config import Config

COARSE = (0.0, 0.0001, 0.001, 0.1, 1.0, 10.0)
FINE = (0.0, 0.25, 0.5, 0.75, 1.0)

HOLDOUT = 0.1
"""Share of the training split on which weights are selected, unless `data.holdout` says another."""

_NOTE = 80
"""Characters of a note in the table."""

Point = tuple[float, ...]
"""A value for each of the weights that are searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
        top1: accuracy on the held-out clips, in [0, 1].
        cross_entropy: on them, nats.
        failure: why it came to no end; None where it did.
    """

    top1: float = 0.0
    cross_entropy: float = math.inf
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Runs that do not depend on each other.

    Attributes:
        name: which grid, and of which weights.
        points: each as often as it is on the grid, also where an earlier stage had it.
    """

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched, and how (paper, after equation 3).

    Each weight in turn takes the values of the coarse grid while the others stay, then keeps the best of them; then
    the same with the fine grid, scaled by the weight's coarse winner (by the smallest coarse value where that is 0).

    Attributes:
        weights: names of the weights, in the order in which they are searched.
        start: their values before.
        coarse, fine: the grids.
        full: all combinations of the coarse grids, then of the fine ones.
    """

    weights: tuple[str, ...]
    start: Point
    coarse: tuple[float, ...] = COARSE
    fine: tuple[float, ...] = FINE
    full: bool = False

    @classmethod
    def of(cls, config: Config, *, full: bool = False) -> Search:
        """Over those weights of a configuration that have a term in its loss.

        Raises:
            UserError: none has.
        """
        loss, decoders = config.loss, config.decoders
        acts = {
            "alpha": loss.ddp in ("high", "both"),
            "beta": loss.ddp in ("low", "both"),
            "lambda_flow": "flow" in decoders,
            "lambda_im": "frame" in decoders,
        }
        weights = tuple(name for name, does in acts.items() if does)
        if not weights:
            raise UserError(
                f"there is no weight to search: model.name={config.model.name} has no decoder here; use "
                "model.name=rev2net or actionflownet"
            )
        return cls(weights=weights, start=tuple(getattr(loss, name) for name in weights), full=full)

    @property
    def sizes(self) -> tuple[int, int]:
        """Cells of the coarse grids and of the fine ones; a run that stands in several is done once."""
        count = len(self.weights)
        coarse, fine = (len(grid) ** count if self.full else len(grid) * count for grid in (self.coarse, self.fine))
        return coarse, fine

    def stages(self, results: Mapping[Point, Result]) -> Iterator[Stage]:
        """The stages in their order, up to the first that has a run without result, or nothing but failed ones."""
        point = self.start
        places = range(len(self.weights))
        for grid in ("coarse", "fine"):
            for together in [tuple(places)] if self.full else [(place,) for place in places]:
                values = [self._values(grid, point[i]) if i in together else (point[i],) for i in places]
                stage = Stage(" ".join([grid, *(self.weights[i] for i in together)]), tuple(product(*values)))
                yield stage
                if not results.keys() >= set(stage.points):
                    return
                point = best(stage.points, results)
                if results[point].failure is not None:
                    return

    def winner(self, results: Mapping[Point, Result]) -> Point:
        """The best point so far, of equals the first on the grids; there has to be a result."""
        points = [point for stage in self.stages(results) for point in stage.points if point in results]
        return best(points or results, results)

    def _values(self, grid: str, value: float) -> tuple[float, ...]:
        if grid == "coarse":
            return self.coarse
        scale = value or min(other for other in self.coarse if other > 0)
        return tuple(float(f"{scale * share:.6g}") for share in self.fine)  # 0.1 x 0.75 is not 0.075 in binary

    def name(self, point: Point) -> str:
        """The name of a run, also of its folder."""
        return "-".join(f"{weight}{value:g}" for weight, value in zip(self.weights, point, strict=True))

    def overrides(self, point: Point) -> list[str]:
        """The point as `key=value` for `rev2net train`."""
        return [f"loss.{weight}={value:g}" for weight, value in zip(self.weights, point, strict=True)]


def sweep_config(config: Config) -> Config:
    """The configuration of a sweep from that of a training: a folder beside its output, clips held out, and no cell
    of the paper's tables, which its runs do not fill.
    """
    data = config.data.model_copy(update={"holdout": config.data.holdout or HOLDOUT})
    tracking = config.tracking.model_copy(update={"cell": None})
    return config.model_copy(update={"output": f"{config.output}-sweep", "data": data, "tracking": tracking})


def best(points: Iterable[Point], results: Mapping[Point, Result]) -> Point:
    """The point of highest accuracy; of equals that of lowest cross-entropy, of equals the first."""

    def quality(point: Point) -> tuple[bool, float, float]:
        result = results[point]
        return result.failure is None, result.top1, -result.cross_entropy

    return max(points, key=quality)


def rows(search: Search, results: Mapping[Point, Result]) -> list[dict[str, str]]:
    """The whole grid as far as it is known, a row for each cell; empty strings for what is still to come."""
    found: list[dict[str, str]] = []
    seen: dict[Point, str] = {}
    leader = search.winner(results) if results else None
    for stage in search.stages(results):
        for point in stage.points:
            result = results.get(point)
            row = {"stage": stage.name, **dict(zip(search.weights, (f"{v:g}" for v in point), strict=True))}
            ended = result is not None and result.failure is None
            row["top1"] = f"{result.top1:.4f}" if ended and result else ""
            row["cross_entropy"] = f"{result.cross_entropy:.4f}" if ended and result else ""
            notes = ["best"] if ended and point == leader else []
            notes += [f"as in {seen[point]}"] if point in seen else []
            notes += [f"failed: {result.failure}"] if result and result.failure else []
            found.append({**row, "run": search.name(point), "note": "; ".join(notes)})
            seen.setdefault(point, stage.name)
    return found


def table(found: Sequence[Mapping[str, str]]) -> str:
    """Rows as aligned text under a line of headings, without the names of the runs; long notes are cut."""
    keys = [key for key in found[0] if key != "run"]
    lines = [keys, *([row[key][:_NOTE] for key in keys] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
