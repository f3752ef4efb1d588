"""A test of trained networks as an MLflow run of its own, in the store of their trainings: `--log`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataloaders.errors import UserError
from dataloaders.shards import DataSet
from rev2net.config import Config
from rev2net.outbox import run_of
from rev2net.store import TESTED_STEPS, TESTS, Run, connect, database
from rev2net.tracking import source_commit, tracking_uri

if TYPE_CHECKING:
    from rev2net.checkpoint import RunState
    from rev2net.evaluate import Metrics


class EvaluationLog:
    """Where a test is going to be kept. Made before the test, which may take hours.

    Args:
        tested: checkpoint, configuration of the test, and state of each stream.
        data: what they are tested on.
        split: of it.

    Raises:
        UserError: the trainings' store or runs cannot be found; a training has not ended with this checkpoint; they are
            of different splits; this is not what they are to be tested on.
    """

    def __init__(self, tested: Sequence[tuple[Path, Config, RunState]], data: DataSet, split: str) -> None:
        first, config, _ = tested[0]
        self._config = config
        self._data, self._split = data, split
        self._checkpoints = [checkpoint for checkpoint, _, _ in tested]
        # The run's folder may have been moved since.
        told = os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = told or tracking_uri(config.model_copy(update={"output": str(first.parent.parent)}))
        file = database(self.uri)
        self._client = connect(self.uri if file is None else f"sqlite:///{file}", called=self.uri)
        self._trainings = [self._training(checkpoint, state) for checkpoint, _, state in tested]
        splits = {run.params.get("data.split") for run in self._trainings}
        if len(splits) > 1:
            raise UserError(
                f"{' and '.join(map(str, self._checkpoints))} were trained on different splits: fuse two of one"
            )
        if not any(self._is_test_of(run) for run in self._trainings):
            wanted = _tested_on(self._trainings[0])
            raise UserError(
                f"{data.location}, split {split}, is not what {first} is to be tested on, which is "
                f"{wanted['path']}, split {wanted['val_split']}: test it on that, or leave out --log"
            )

    def _training(self, checkpoint: Path, state: RunState) -> Run:
        from mlflow.exceptions import MlflowException

        run_id = run_of(checkpoint, state.run_id)
        if run_id is None:
            raise UserError(f"{checkpoint} knows no MLflow run, because tracking was off: leave out --log")
        try:
            run = Run.of(self._client.get_run(run_id))
        except MlflowException:
            raise UserError(
                f"{self.uri} does not know the run {run_id} that trained {checkpoint}: set MLFLOW_TRACKING_URI to the "
                "store that does, or leave out --log"
            ) from None
        steps = run.params.get("train.steps", "an unknown number")
        if steps != str(state.step):
            raise UserError(
                f"{checkpoint} stands at step {state.step} of {steps}: only tests of the end of a training are logged; "
                "leave out --log"
            )
        return run

    def _is_test_of(self, run: Run) -> bool:
        wanted = _tested_on(run)
        return (wanted["fingerprint"], wanted["val_split"]) == (self._data.fingerprint(), self._split)

    def write(self, result: Metrics) -> str:
        """Keep the result; the id of its run."""
        from mlflow.entities import Metric, Param

        views = self._config.eval.views
        tags = {TESTS: " ".join(run.id for run in self._trainings)}
        commit = source_commit()
        if commit is not None:
            tags["mlflow.source.git.commit"] = commit
        experiment = self._client.get_run(self._trainings[0].id).info.experiment_id
        name = f"{' + '.join(run.name for run in self._trainings)}, {views}"
        run_id = str(self._client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        now = int(time.time() * 1000)
        values = {**result.named("test/"), "test/videos": result.videos, "test/failed": len(result.failed)}
        params = {
            "eval.views": views,
            "train.precision": self._config.train.precision,
            "data.path": self._data.location,
            "data.val_split": self._split,
            "checkpoints": " ".join(map(str, self._checkpoints)),
            TESTED_STEPS: " ".join(run.params["train.steps"] for run in self._trainings),
        }
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), now, 0) for key, value in values.items()],
            params=[Param(key, value) for key, value in params.items()],
        )
        self._client.log_text(run_id, json.dumps(result.matrix(self._data.classes)), "confusion.json")
        self._client.set_terminated(run_id)
        return run_id


def _tested_on(run: Run) -> dict[str, str]:
    """Path, split and fingerprint of the data that a training is to be tested on: the target domain's if it has one."""
    section = "data" if run.params.get("target.path", "None") == "None" else "target"
    return {key: run.params.get(f"{section}.{key}", "unknown") for key in ("path", "val_split", "fingerprint")}
