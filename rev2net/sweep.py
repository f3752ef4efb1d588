"""The search for the loss weights: each point of the grids is an ordinary training, and a child run in MLflow.

The folder of a sweep holds a folder for each run, `journal.log` with the results (Optuna's), the grid as `grid.csv`
and `grid.png`, and in the end `result.json`. Any number of processes may work on it at once, on machines that share
it: who holds the lock of a run's folder does that run. The kernel gives the lock of a dead process back, so whoever
comes next goes on with its run, from its last checkpoint.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
import torch
import yaml
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from dataloaders.errors import UserError
from dataloaders.locks import lock
from dataloaders.shards import write_atomically
from rev2net import pictures
from rev2net.config import WITHOUT_EFFECT, Config, config_from_tree
from rev2net.data import open_data, open_target
from rev2net.distributed import join, read_ranks
from rev2net.grid import Point, Result, Search, Stage, rows, table
from rev2net.tracking import Tracker, tracking_uri
from rev2net.train import NonFiniteLossError, train

log = logging.getLogger("rev2net")

POLL_SECONDS = 2.0
"""Between two looks whether the runs of other processes have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """How a sweep ended.

    Attributes:
        table: the whole grid as text.
        winner: the best point as `key=value` for `rev2net train`.
        result: what it reached.
        tracking_uri: where the runs are kept.
    """

    table: str
    winner: list[str]
    result: Result
    tracking_uri: str


def sweep(config: Config, search: Search, *, stop_requested: Callable[[], bool] = lambda: False) -> SweepResult | None:
    """Do the runs that are left, with all other processes that work on the same sweep.

    A run whose loss is not finite is a failed cell of the grid. Whatever else ends a training has nothing to do with
    its weights, and ends this call.

    Args:
        config: as `sweep_config` gives it.
        search: the grids.
        stop_requested: as for `train`.

    Returns:
        None where it was stopped before the end.

    Raises:
        UserError: as `train`, or the folder holds a sweep with other settings.
        RuntimeError: as `train`; all runs of a stage failed; MLflow was away when the sweep began.
        OSError: as `train`.
    """
    ranks = read_ranks()
    # A mistake there is told before the folder keeps the settings.
    data = open_data(config)
    target = open_target(config, data.classes) if config.target.trained_on else None
    clips = {"data": data.fingerprint()} | ({} if target is None else {"target": target.fingerprint()})
    folder = _Folder(config, search, clips) if ranks.first else None
    if ranks.world_size > 1:
        join(ranks, config.train.threads)
    while not ranks.any(stop_requested()):
        with ExitStack() as held:
            is_open, run = ranks.broadcast(folder.claim(held) if folder else None)
            if not is_open:
                ended: SweepResult = ranks.broadcast(folder.result() if folder else None)
                return ended
            if run is None:
                time.sleep(POLL_SECONDS)
                continue
            result = _run(run, stop_requested)
            if result is None:
                return None
            if folder:
                folder.add(result)
    return None


def _run(config: Config, stop_requested: Callable[[], bool]) -> Result | None:
    """One training; None where it was stopped."""
    try:
        ended = train(config, stop_requested=stop_requested)
    except NonFiniteLossError as error:
        return Result(failure=str(error))
    finally:
        # What has ended refers to itself in circles: the next one would find its memory taken.
        gc.collect()
        torch.cuda.empty_cache()
    if not ended.finished:
        return None
    return Result(top1=ended.metrics["val/top1"], cross_entropy=ended.metrics["val/cross_entropy"])


class _Folder:
    """The folder of a sweep, as one of the processes that work on it sees it. On rank 0.

    Args:
        clips: fingerprints of the data sets that the runs learn from, `data` and perhaps `target`.

    Raises:
        UserError: it holds a sweep with other settings, or on other clips.
        RuntimeError: MLflow is away, and the sweep has no run there yet.
    """

    def __init__(self, config: Config, search: Search, clips: Mapping[str, str]) -> None:
        self._config, self._search, self._clips = config, search, dict(clips)
        self._folder = Path(config.output)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._point: Point = ()
        self._waiting: str | None = None
        self._journal = self._folder / "journal.log"
        with lock(self._folder / "sweep"):
            self._study = _open_journal(self._journal)
            self._check_config()
            self._check_search()
            self._parent = self._publish()

    @property
    def _begun(self) -> bool:
        """Whether a run of it has been started, or is being; before that it may still become another sweep."""
        if self._study.get_trials(deepcopy=False):
            return True
        return any(self._folder.glob("*/config.yaml")) or any(map(_is_held, self._folder.glob("*/run.lock")))

    def _check_config(self) -> None:
        file = self._folder / "config.yaml"
        if not self._begun or not file.exists():
            write_atomically(file, self._config.yaml().encode())
            return
        mine, theirs = self._config.flat(), config_from_tree(yaml.safe_load(file.read_text())).flat()
        for key in mine:
            if not key.startswith(WITHOUT_EFFECT) and mine[key] != theirs.get(key):
                self._refuse(f"{key}={theirs.get(key)}", f"{key}={mine[key]}")

    def _check_search(self) -> None:
        mine = json.loads(json.dumps(asdict(self._search)))
        theirs = self._study.user_attrs.get("search")
        if theirs is None or not self._begun:
            self._study.set_user_attr("search", mine)
        elif theirs != mine:
            self._refuse(*("the full product" if tree["full"] else "one weight at a time" for tree in (theirs, mine)))
        kept = self._study.user_attrs.get("clips")
        if kept is None or not self._begun:
            self._study.set_user_attr("clips", self._clips)
        elif kept != self._clips:
            name = next(name for name in sorted(self._clips) if kept.get(name) != self._clips[name])
            raise UserError(
                f"{self._folder} holds a sweep on other clips than {getattr(self._config, name).path} holds now: set "
                f"{name}.path to the data set as it was, or choose another output="
            )

    def _refuse(self, theirs: str, mine: str) -> None:
        raise UserError(
            f"{self._folder} holds a sweep with {theirs}, not {mine}: give the settings that it began with, or "
            "choose another output="
        )

    def _results(self) -> dict[Point, Result]:
        found = {}
        for trial in self._study.get_trials(deepcopy=False):
            point = tuple(trial.params[weight] for weight in self._search.weights)
            if trial.state == TrialState.COMPLETE:
                found[point] = Result(top1=trial.values[0], cross_entropy=trial.values[1])
            else:
                found[point] = Result(failure=trial.user_attrs["failure"])
        return found

    def claim(self, held: ExitStack) -> tuple[bool, Config | None]:
        """Whether there are runs without result, and the configuration of one of them, which nobody else does.

        It is this process's until `held` is closed.

        Raises:
            UserError: the folder has become another sweep before this one had begun.
        """
        if not self._point:
            with lock(self._folder / "sweep"):
                self._check_config()
                self._check_search()
                return self._claim(held)
        return self._claim(held)

    def _claim(self, held: ExitStack) -> tuple[bool, Config | None]:
        results = self._results()
        *_, stage = self._search.stages(results)
        left = [point for point in stage.points if point not in results]
        for point in left:
            run = self._run_config(point)
            Path(run.output).mkdir(exist_ok=True)
            # Its result may have come since they were read.
            if held.enter_context(lock(Path(run.output) / "run", wait=False)) and point not in self._results():
                self._point = point
                return True, run
        if left and self._waiting != stage.name:
            self._waiting = stage.name
            log.info("stage %s: other processes do the %d runs that are left", stage.name, len(left))
        return bool(left), None

    def _run_config(self, point: Point) -> Config:
        config, name = self._config, self._search.name(point)
        loss = dict(zip(self._search.weights, point, strict=True))
        tracking = {"parent": self._parent, "run_name": name, "uri": tracking_uri(config)}
        updates = {
            "output": str(self._folder / name),
            "loss": config.loss.model_copy(update=loss),
            "tracking": config.tracking.model_copy(update=tracking),
        }
        return config.model_copy(update=updates)

    def add(self, result: Result) -> None:
        """Keep the result of the run that was claimed, and drop its checkpoints, which nothing needs any more."""
        failed = result.failure is not None
        highest = max(*self._search.coarse, *self._search.start, *self._point)
        trial = create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            params=dict(zip(self._search.weights, self._point, strict=True)),
            distributions=dict.fromkeys(self._search.weights, FloatDistribution(0.0, highest)),
            values=None if failed else [result.top1, result.cross_entropy],
            user_attrs={"failure": result.failure} if failed else {},
        )
        with lock(self._folder / "sweep"):
            _mend(self._journal)  # another process may have ended in the middle
            self._study.add_trial(trial)
            self._parent = self._publish() or self._parent  # another, where somebody has deleted it
        shutil.rmtree(self._folder / self._search.name(self._point) / "checkpoints", ignore_errors=True)

    def _publish(self) -> str | None:
        """Write the grid into the folder and tell MLflow; the id of the sweep's run there."""
        results = self._results()
        stages = list(self._search.stages(results))
        finished = results.keys() >= set(stages[-1].points)
        found = rows(self._search, results)
        text = io.StringIO()
        writer = csv.DictWriter(text, found[0].keys())
        writer.writeheader()
        writer.writerows(found)
        write_atomically(self._folder / "grid.csv", text.getvalue().encode())
        tracker = Tracker(self._config, active=True, resumed=len(results))
        self._tell(tracker, results, stages, finished)
        if finished:
            with tracker:
                write_atomically(self._folder / "result.json", json.dumps(asdict(self.result()), indent=1).encode())
                tracker.flush()
        else:
            if tracker.run_id is not None:
                # Other tasks wait for the lock, and their ranks for them: what is left is told with the next result.
                tracker.hurry()
            tracker.flush()
            tracker.close()
        if self._config.tracking.enabled and tracker.run_id is None:
            raise RuntimeError(
                f"MLflow at {tracker.uri} has made no run for the sweep ({tracker.trouble or 'it does not answer'}), "
                "below which its runs have to be: mend that and run the same command again, or set "
                "tracking.enabled=false"
            )
        return tracker.run_id

    def _tell(self, tracker: Tracker, results: Mapping[Point, Result], stages: list[Stage], finished: bool) -> None:
        search = self._search
        tags = {
            "sweep.weights": ", ".join(search.weights),
            "sweep.search": "full product" if search.full else "one weight at a time",
            "sweep.coarse": ", ".join(f"{value:g}" for value in search.coarse),
            "sweep.fine": ", ".join(f"{value:g}" for value in search.fine),
            "sweep.state": "finished" if finished else f"{stages[-1].name}, {len(results)} runs done",
        }
        ended = [point for point in results if results[point].failure is None]
        if ended:
            winner = search.winner(results)
            values = {"top1": results[winner].top1, "cross_entropy": results[winner].cross_entropy}
            values |= dict(zip(search.weights, winner, strict=True))
            tracker.metrics({f"best/{name}": value for name, value in values.items()}, len(results))
            if finished:
                tags["sweep.winner"] = " ".join(search.overrides(winner))
            tracker.figure(pictures.weights(search.weights, results, winner), "grid.png")
        tracker.tags(tags)
        tracker.file("grid.csv")

    def result(self) -> SweepResult:
        """Of a sweep without open runs.

        Raises:
            RuntimeError: all runs of its last stage failed.
        """
        results = self._results()
        stages = list(self._search.stages(results))
        failures = [results[point].failure for point in stages[-1].points]
        if None not in failures:
            raise RuntimeError(f"all runs of the stage {stages[-1].name} failed, the first: {failures[0]}")
        winner = self._search.winner(results)
        return SweepResult(
            table=table(rows(self._search, results)),
            winner=self._search.overrides(winner),
            result=results[winner],
            tracking_uri=tracking_uri(self._config),
        )


def _is_held(file: Path) -> bool:
    """Whether a process has a lock's file."""
    with lock(file.with_suffix(""), wait=False) as free:
        return not free


def _mend(file: Path) -> None:
    """Take away what a full disk or a kill has left: the next line would be spoilt by a torn one, and wait for a lock.

    Whoever writes holds the lock of the sweep, so that Optuna's own, a link, is nobody's.
    """
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with file.open("r+b") as torn:
            torn.truncate(whole)


def _open_journal(file: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if file.exists():
        _mend(file)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file))),
        study_name="sweep",
        directions=["maximize", "minimize"],
        load_if_exists=True,
    )
