"""The paper's tables from MLflow runs: which runs are of which cell, which of them count, and what they give.

A cell of `configs/tables.yaml` is one configuration, or two whose streams are fused. A training says with its parameter
`tracking.cell` which configuration it is of; a test that `--log` kept names its trainings. Everything is read from the
store, beside the tables and configurations themselves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import yaml

from dataloaders.errors import UserError
from dataloaders.official import SPLIT_NUMBERS
from rev2net.config import PLACES, WITHOUT_EFFECT, Config, load_config
from rev2net.store import TESTED_STEPS, TESTS, Run, Store

CONFIGS = Path(__file__).parents[1] / "configs"
"""Tables and configurations; they lie beside the package in a checkout."""

FREE = (*WITHOUT_EFFECT, "output", "data.path", "data.split", "train.seed")
"""Beginnings of keys that may differ from a cell's configuration."""

DATA = {
    "ucf101-1": ("ucf101", "101"),
    "hmdb51-1": ("hmdb51", "51"),
    "ucf101-16": ("ucf101", "16"),
    "hmdb51-16": ("hmdb51", "16"),
    "kinetics400": ("kinetics", "400"),
}
"""The official lists and number of classes that a configuration means with the name of its data's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run that was meant for a cell: a training, or a test of trainings.

    Attributes:
        trainings: the training, or those that are tested.
        cell: their configurations.
        seed: train.seed.
        split: the official split, from 1.
        top1: share of the test videos; None where there is none.
        steps: "60 of 60", what was done of what was to be done.
        views, precision: of the test.
        deviations: what is not as in the cell's configuration.
        why_not: why it does not enter the cell's number; None where it does.
    """

    run: Run
    trainings: tuple[Run, ...]
    cell: tuple[str, ...]
    seed: str = "?"
    split: int = 0
    top1: float | None = None
    steps: str = ""
    views: str = "?"
    precision: str = "?"
    deviations: tuple[str, ...] = ()
    why_not: str | None = None

    @property
    def is_test(self) -> bool:
        """Whether it is a run of `rev2net eval --log` or `rev2net splits --log`."""
        return TESTS in self.run.tags


@dataclass(frozen=True)
class Wanted:
    """What a training of a configuration is held against.

    Attributes:
        splits: the official splits that its number is the mean of.
    """

    config: Config
    splits: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> Wanted:
        """All three official splits, where the configuration has data of each."""
        first, second = (load_config(path, [f"data.split={split}"]) for split in (1, 2))
        return cls(first, SPLIT_NUMBERS if first.data.path != second.data.path else (1,))

    @property
    def start(self) -> str | None:
        """The configuration whose training it starts from."""
        return None if self.config.init_from is None else self.config.init_from.removeprefix("runs/")

    @property
    def tested_on(self) -> Literal["data", "target"]:
        """The section of the configuration whose data it is tested on: another domain's, or its own."""
        return "data" if self.config.target.path is None else "target"

    @property
    def metric(self) -> str:
        """Its accuracy there, as a training logs it."""
        return "val/top1" if self.tested_on == "data" else "target/top1"


@dataclass(frozen=True)
class Cell:
    """A number of the tables, and the runs that were meant for it.

    Attributes:
        configs: of its one or two streams, below `configs/`, without `.yaml`.
        wanted: by the first of them.
        results: oldest first.
    """

    configs: tuple[str, ...]
    wanted: Wanted
    results: tuple[Result, ...] = ()

    @cached_property
    def counted(self) -> tuple[Result, ...]:
        """Those that enter the number: one for each seed and split."""
        return tuple(r for r in self.results if r.why_not is None)

    @cached_property
    def _seeds(self) -> dict[str, list[float]]:
        seeds: dict[str, list[float]] = defaultdict(list)
        for result in self.counted:
            assert result.top1 is not None
            seeds[result.seed].append(result.top1)
        return seeds

    @property
    def value(self) -> float | None:
        """Mean over the seeds of the means over their splits, in [0, 1]; None without a result."""
        return mean(map(mean, self._seeds.values())) if self._seeds else None

    @property
    def seeds(self) -> int:
        """How many seeds are in the number."""
        return len(self._seeds)

    @property
    def splits(self) -> int:
        """How many splits each seed has."""
        return max(map(len, self._seeds.values()), default=0)

    @property
    def spread(self) -> tuple[float, str] | None:
        """Standard deviation (n - 1), and over what: the seeds' means, or the splits of the only seed."""
        means = [mean(values) for values in self._seeds.values()]
        if len(means) > 1:
            return stdev(means), "seeds"
        only = next(iter(self._seeds.values()), [])
        return (stdev(only), "splits") if len(only) > 1 else None

    @property
    def deviates(self) -> bool:
        """Whether a run in the number was not made as the configuration says."""
        return any(result.deviations for result in self.counted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a store holds of the tables.

    Attributes:
        tables: the tree of `configs/tables.yaml`.
        cells: by their configurations; each single stream is one, whether or not a table shows it alone.
        left_out: runs that are of no cell.
        orphans: those of them that test a training of a cell beside one that is not in the store.
    """

    tables: Mapping[str, Any]
    cells: Mapping[tuple[str, ...], Cell]
    left_out: int
    orphans: int = 0


def read_report(store: Store, experiments: Sequence[str] = ()) -> Report:
    """Read all that the tables need.

    Raises:
        UserError: no such experiment, or no tables where this code was installed.
    """
    file = CONFIGS / "tables.yaml"
    if not file.is_file():
        raise UserError(f"there is no {file}: run this command from a checkout, which has the paper's tables")
    tables = yaml.safe_load(file.read_text())
    pairs = {tuple(cell["runs"]) for table in tables.values() for row in table["rows"] for cell in row["cells"]}
    names = {name for pair in pairs for name in pair}
    made = {name: Wanted.of(CONFIGS / f"{name}.yaml") for name in sorted(names)}
    made |= {start: Wanted.of(CONFIGS / f"{start}.yaml") for w in made.values() if (start := w.start) is not None}
    runs = store.runs(experiments)
    shown = {run.id for run in runs}
    # What a training starts from, and what a test tests, may be of any experiment.
    every = store.runs() if experiments else runs
    trainings = [_training(store, run, made[name]) for run in every if (name := _cell_of(run)) in made]
    trainings = _with_starts(trainings, {name: wanted.start for name, wanted in made.items()})
    by_run = {result.run.id: result for result in trainings}
    trainings = _newest([result for result in trainings if result.run.id in shown])
    by_run |= {result.run.id: result for result in trainings}
    known = [(run, _parts(run, by_run)) for run in runs]
    tests = [_test(run, parts) for run, parts in known if parts and len(parts) == len(_tested(run))]
    orphans = sum(0 < len(parts) < len(_tested(run)) for run, parts in known)
    found: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in sorted([*trainings, *tests], key=lambda r: (r.run.started, r.run.id)):
        found[result.cell].append(result)
    cells = {}
    for cell in sorted(pairs | {(name,) for name in made}):
        wanted = made[cell[0]]
        results = found.get(tuple(sorted(cell)), [])
        cells[cell] = Cell(cell, wanted, _choose(results, wanted.config.eval.views))
    used = sum(len(cell.results) for cell in cells.values())
    return Report(tables=tables, cells=cells, left_out=len(runs) - used, orphans=orphans)


def _cell_of(run: Run) -> str:
    return "" if TESTS in run.tags else run.params.get("tracking.cell", "")


def _training(store: Store, run: Run, wanted: Wanted) -> Result:
    params, metric = run.params, wanted.metric
    split, steps = (whole(params.get(key)) for key in ("data.split", "train.steps"))
    seed = params.get("train.seed", "")
    step, top1 = ([(0, None), *store.history(run, metric)])[-1]
    why_not = None
    if run.status != "FINISHED":
        why_not = f"it is {run.status}"
    elif not _is_seed(seed) or split is None or steps is None:
        why_not = "its train.seed, data.split and train.steps are not all numbers"
    elif (held := params.get("data.holdout", "0.0")) not in ("0", "0.0"):
        why_not = f"its accuracy is of training clips that data.holdout={held} kept back"
    elif split not in wanted.splits:
        why_not = f"data.split={split} is none of this cell's"
    elif top1 is None or step != steps:
        why_not = f"it was stopped: no {metric} after step {steps}"
    elif not 0 <= top1 <= 1:
        why_not = f"its {metric} is {top1:g}"
    return Result(
        run=run,
        trainings=(run,),
        cell=(params["tracking.cell"],),
        seed=seed if _is_seed(seed) else "?",
        split=split or 0,
        top1=top1,
        steps=f"{step} of {'?' if steps is None else steps}",
        views=params.get("eval.views", "?"),
        precision=params.get("train.precision", "?"),
        deviations=_deviations(run, wanted.config),
        why_not=why_not,
    )


def whole(text: str | None) -> int | None:
    """A parameter that is a number from 0 up; None where it is anything else."""
    return int(text) if text is not None and text.isdecimal() and text.isascii() and len(text) < 10 else None


def _is_seed(text: str) -> bool:
    """Whether it is a number, of any length and sign."""
    return re.fullmatch("-?[0-9]+", text) is not None


def _deviations(run: Run, config: Config) -> tuple[str, ...]:
    """`key=value (as configured)` of every key that a result may depend on, at the run's first and its last start."""
    wanted = config.flat()
    keys = [*wanted, *(key for key in {**run.first, **run.params} if key.startswith("train.deepspeed."))]
    found = []
    for key in (key for key in keys if not key.startswith(FREE)):
        own = _comparable(key, wanted.get(key, "None"))
        now, first = (_comparable(key, params.get(key, own)) for params in (run.params, run.first))
        if now != own:
            found.append(f"{key}={now} ({own})")
        before = [first, *(_comparable(key, value) for value in run.earlier.get(key, ()))]
        odd = [value for value in dict.fromkeys(before) if value not in (own, now)]
        found += [f"{key}={value} before a resume ({own})" for value in odd]
    return (*found, *_other_data(run, config))


def _other_data(run: Run, config: Config) -> Iterator[str]:
    """The same of the data: where it lies is free, of which lists and how many classes it is not."""
    for section, path in (("data", config.data.path), ("target", config.target.path)):
        if path is not None:
            for key, own in zip((f"{section}.lists", f"{section}.classes"), DATA[Path(path).name], strict=True):
                if (used := run.params.get(key, own)) != own:
                    yield f"{key}={used} ({own})"


def _comparable(key: str, value: str) -> str:
    # Of a path on some machine only whether there is one.
    return "a path" if key in PLACES and value != "None" else value[:500]


def _with_starts(trainings: Sequence[Result], starts: Mapping[str, str | None]) -> list[Result]:
    """The same; where a configuration starts from the weights of another, what is wrong with those is a deviation.

    Args:
        starts: of each configuration, the one whose training it starts from.
    """
    by_run = {result.run.id: result for result in trainings}
    made = []
    for result in trainings:
        start, params = starts[result.cell[0]], result.run.params
        wrong = []
        if start is not None and params.get("init_from", "None") != "None":
            found = by_run.get(params.get("init_from.run", ""))
            if found is None or found.cell != (start,):
                wrong = [f"starts from weights that no run of {start} in this store trained"]
            elif found.why_not is not None or _of_training(found):
                wrong = [f"starts from {found.run.id}, which deviates or did not come to its end"]
            elif (step := params.get("init_from.step", "?")) != (last := found.run.params["train.steps"]):
                wrong = [f"starts from step {step} of {found.run.id}, whose training has {last}"]
        made.append(replace(result, deviations=(*result.deviations, *wrong)))
    return made


def _of_training(result: Result) -> list[str]:
    """What deviates in the weights: their last test may have been any."""
    return [text for text in result.deviations if not text.startswith("eval.views=")]


def _newest(trainings: Sequence[Result]) -> list[Result]:
    """Of good trainings of one cell, seed and split the newest counts, of those as configured if there is one."""
    good = [r for r in trainings if r.why_not is None]
    as_configured = sorted(good, key=lambda r: not _of_training(r))  # stable: in the order of time otherwise
    chosen = {(r.cell, r.seed, r.split): r for r in as_configured}
    made = []
    for result in trainings:
        other = chosen.get((result.cell, result.seed, result.split), result)
        if result.why_not is None and other is not result:
            better = "is as configured" if _of_training(result) and not _of_training(other) else "is a newer one"
            made.append(replace(result, why_not=f"{other.run.id} {better}"))
        else:
            made.append(result)
    return made


def _parts(run: Run, by_run: Mapping[str, Result]) -> list[Result]:
    """The trainings of cells that a test tests, in the order of their cells."""
    return sorted((by_run[run_id] for run_id in _tested(run) if run_id in by_run), key=lambda part: part.cell)


def _tested(run: Run) -> list[str]:
    """The ids of the trainings that a test tests."""
    return run.tags.get(TESTS, "").split()


def _test(run: Run, parts: Sequence[Result]) -> Result:
    top1 = run.metrics.get("test/top1")
    stood = dict(zip(_tested(run), run.params.get(TESTED_STEPS, "").split(), strict=False))
    older = [part for part in parts if stood.get(part.run.id, "?") != part.run.params.get("train.steps")]
    why_not = None
    if run.status != "FINISHED":
        why_not = f"it is {run.status}"
    elif lost := [part.run.id for part in parts if part.why_not is not None]:
        why_not = f"it tests {lost[0]}, which does not count"
    elif older:
        went_on = older[0].run
        step, last = stood.get(went_on.id, "?"), went_on.params["train.steps"]
        why_not = f"it tests step {step} of {went_on.id}, whose training has {last}"
    elif len({part.split for part in parts}) > 1:
        why_not = "its trainings are of different splits"
    elif len({part.seed for part in parts}) > 1:
        why_not = "its trainings are of different seeds"
    elif top1 is None or not 0 <= top1 <= 1:
        why_not = f"its test/top1 is {top1}"
    deviations = [text for part in parts for text in _of_training(part)]
    return Result(
        run=run,
        trainings=tuple(part.run for part in parts),
        cell=tuple(name for part in parts for name in part.cell),
        seed=parts[0].seed,
        split=parts[0].split,
        top1=top1,
        views=run.params.get("eval.views", "?"),
        precision=run.params.get("train.precision", "?"),
        deviations=tuple(dict.fromkeys(deviations)),
        why_not=why_not,
    )


def _choose(results: Sequence[Result], views: str) -> tuple[Result, ...]:
    """The same, with one for each seed and split that counts, and the reason of all others.

    Args:
        views: of the protocol.
    """
    chosen: dict[tuple[str, int], Result] = {}
    for result in results:  # oldest first
        before = chosen.get((result.seed, result.split))
        if result.why_not is None and (before is None or _rank(result, views) >= _rank(before, views)):
            chosen[result.seed, result.split] = result
    faithful = [result for result in chosen.values() if not _of_training(result)]
    if faithful:  # trials of other seeds are no part of their mean
        chosen = {place: result for place, result in chosen.items() if not _of_training(result)}
    splits = {seed: tuple(sorted(split for of, split in chosen if of == seed)) for seed, _ in chosen}
    most = max(splits, key=lambda seed: len(splits[seed]), default="")  # the first such
    made = []
    for result in results:
        first = chosen.get((result.seed, result.split))
        why_not = result.why_not
        if why_not is None and first is not None and first is not result:
            why_not = f"{first.run.id} counts instead"
        elif why_not is None and faithful and _of_training(result):
            why_not = f"it deviates, and {faithful[0].run.id} is as configured"
        elif why_not is None and splits[result.seed] != splits[most]:
            own_splits, others = (", ".join(map(str, splits[seed])) for seed in (result.seed, most))
            why_not = f"seed {result.seed} has split {own_splits} and seed {most} {others}: no spread of seeds"
        own = f"eval.views={result.views} ({views})"
        odd = result.is_test and result.views != views
        made.append(replace(result, why_not=why_not, deviations=(*result.deviations, *([own] if odd else []))))
    return tuple(made)


def _rank(result: Result, views: str) -> tuple[bool, bool, bool]:
    """Weights as configured come first, then numbers under the configured views, then those of tests of their own."""
    return not _of_training(result), result.views == views, result.is_test
