"""MLflow: one run per training, from rank 0 alone."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from rev2net.config import Config

log = logging.getLogger("rev2net")

PACKAGES = ("torch", "torchvision", "deepspeed", "nvidia-dali-cuda120", "webdataset", "mlflow", "av", "numba")


class Tracker:
    """The MLflow run of a training; on other ranks, or with tracking off, every method does nothing.

    Without `tracking.uri` and `MLFLOW_TRACKING_URI` the store is `mlflow.db` (SQLite) beside the output folder, so
    that nothing has to be started. A resumed training goes on in the same run.
    """

    def __init__(self, config: Config, *, active: bool, run_id: str | None) -> None:
        self.run_id: str | None = None
        self.uri = tracking_uri(config)
        self._client: Any = None
        if not active or not config.tracking.enabled:
            return
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient  # seconds to import, and only rank 0 needs it

        self._client = MlflowClient(self.uri)
        self.run_id = run_id if run_id is not None and self._has(run_id) else self._create(config)
        self._client.update_run(self.run_id, status="RUNNING")

    def _has(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(run_id)
        except MlflowException:
            log.warning("%s does not know the run %s that the checkpoint was in: a new run is made", self.uri, run_id)
            return False
        return True

    def _create(self, config: Config) -> str:
        name = config.tracking.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            experiment = found.experiment_id
        else:
            # A file store keeps artifacts beside it; a server chooses its own place.
            local = self.uri.startswith("sqlite:///")
            folder = Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
            experiment = self._client.create_experiment(name, folder.as_uri() if local else None)
        run_name = config.tracking.run_name or Path(config.output).name
        run = self._client.create_run(experiment, run_name=run_name, tags=_environment())
        self._log_params(run.info.run_id, config)
        self._client.log_text(run.info.run_id, config.yaml(), "config.yaml")
        return str(run.info.run_id)

    def _log_params(self, run_id: str, config: Config) -> None:
        from mlflow.entities import Param

        params = [Param(key, value[:500]) for key, value in config.flat().items()]
        self._client.log_batch(run_id, params=params)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars of one step."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [Metric(name, float(v), now, step) for name, v in values.items()])

    def figure(self, figure: Any, file: str) -> None:
        """Log a matplotlib figure as a picture."""
        if self._client is not None:
            self._client.log_figure(self.run_id, figure, file)

    def text(self, text: str, file: str) -> None:
        """Log a text file."""
        if self._client is not None:
            self._client.log_text(self.run_id, text, file)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run: FINISHED, or FAILED where an exception passes."""
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if kind is None else "FAILED")


def tracking_uri(config: Config) -> str:
    """Where runs are kept: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the output folder."""
    return (
        config.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{Path(config.output).resolve().parent / 'mlflow.db'}"
    )


def _environment() -> dict[str, str]:
    tags = {f"version.{name}": version(name) for name in PACKAGES}
    tags["version.python"] = platform.python_version()
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return tags
