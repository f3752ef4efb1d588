"""MLflow: one run per training, from rank 0 alone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from dataloaders.errors import first_line
from rev2net.config import PLACES, WITHOUT_EFFECT, Config
from rev2net.outbox import Outbox, Row
from rev2net.store import CHANGED, EARLIER, make_client

log = logging.getLogger("rev2net")

PACKAGES = ("torch", "torchvision", "deepspeed", "nvidia-dali-cuda120", "webdataset", "mlflow", "av", "numba")

RETRY_SECONDS = 5.0
"""Between two tries of a server that does not answer."""

TRIES = 3
"""Of an entry that a store refuses."""
_REFUSALS = frozenset({
    *("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"),
    "RESOURCE_DOES_NOT_EXIST",  # not our run, which is asked for before each try
})  # fmt: skip
"""MLflow's codes for an entry that is wrong. All else, a full disk or a locked database say, is the store's trouble."""

ASIDE_SECONDS = 60.0
"""Between two tries of a store for files that does not take any."""

VALUES_AT_ONCE = 1000
"""MLflow's limit for one request."""

PATIENCE_SECONDS = 60.0
"""For a server that does not answer when the training has ended."""

HURRY_SECONDS = 3.0
"""The same when the training has been told to stop."""


class Tracker:
    """The MLflow run of a training; on other ranks, or with tracking off, every method does nothing.

    Without `tracking.uri` and `MLFLOW_TRACKING_URI` the store is `mlflow.db` (SQLite) beside the output folder, so
    that nothing has to be started. A resumed training goes on in the same run, and what it logs of steps that the
    run has already is dropped, unless its configuration has changed. A thread of its own talks to MLflow, from an
    outbox on disk: a server that is slow or away costs the training nothing, and gets everything later, at the
    latest when the same command runs again.

    Attributes:
        uri: of the store.
        run_id: of the run, once there is one.
        trouble: what the store last said where it failed; empty before.

    Args:
        config: the experiment.
        active: whether this process is the one that logs.
        resumed: the step that the training goes on from; None for a new one.
        complete: the training has come to its end before: what is left is delivered, nothing is told anew.
        run_id: the run that the checkpoint was in, where the output folder does not know it.
        facts: parameters that the configuration does not say.
    """

    def __init__(
        self,
        config: Config,
        *,
        active: bool,
        resumed: int | None = None,
        complete: bool = False,
        run_id: str | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.uri = tracking_uri(config)
        self._config = config
        self._active = active and config.tracking.enabled
        self._client: Any = None
        self.trouble = ""
        self._closing = self._given_up = self._files_wait = False
        self._patience, self._ending = PATIENCE_SECONDS, "FINISHED"
        self._changed = threading.Condition()
        self._last: dict[str, int] = {}
        self.run_id = run_id
        if not self._active:
            return
        self._outbox = Outbox(Path(config.output), fresh=resumed is None)
        if self._outbox.run is not None:
            # One store may have several names (of a symbolic link, say): it is asked whether it has the run.
            self.run_id = self._outbox.run[1]
        for row in self._outbox.rows:
            self._forget_after(row.get("anew_after"))
            self._last |= dict.fromkeys(row.get("values", ()), row.get("step", 0))
        if complete:
            self._tell_the_end()
        else:
            self._tell_parameters({**config.flat(), **(facts or {})}, resumed)
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def _tell_the_end(self) -> None:
        # A kill may have come between the result and the run's status.
        if self._outbox.rows and self._outbox.rows[-1].get("status") != "FINISHED":
            self._put({"status": "FINISHED"})

    def _tell_parameters(self, values: Mapping[str, str], resumed: int | None) -> None:
        params = {key: value[:500] for key, value in values.items()}
        if not self._outbox.rows:
            if self._outbox.forgotten is not None and self._outbox.forgotten[0] == self.uri:
                self._put({"replaces": self._outbox.forgotten[1]})
            self._put({"params": params})
            self._put({"text": self._config.yaml(), "name": "config.yaml"})
        elif changed := dict(params.items() - self._told().items()):
            # MLflow's own parameters cannot change.
            row: dict[str, Any] = {"tags": {CHANGED + key: value for key, value in sorted(changed.items())}}
            had = {key: values for key, values in sorted(self._changes().items()) if key in changed}
            row["tags"] |= {EARLIER + k: json.dumps(had[k]) for k in had if not k.startswith(WITHOUT_EFFECT)}
            if any(not key.startswith((*WITHOUT_EFFECT, *PLACES)) for key in changed):
                # Steps that are done again give other values, and so does another test of the step that it stands at.
                assert resumed is not None, "a fresh outbox has no rows"
                row["anew_after"] = resumed - 1
                self._forget_after(row["anew_after"])
            self._put(row)

    def _forget_after(self, step: int | None) -> None:
        if step is not None:
            self._last = {name: min(last, step) for name, last in self._last.items()}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars of one step; those that were logged for this step before a resume are dropped."""
        new = {name: float(value) for name, value in values.items() if self._last.get(name, -1) < step}
        self._last |= dict.fromkeys(new, step)
        if new:
            self._put({"step": step, "time": int(time.time() * 1000), "values": new})

    def figure(self, figure: Any, name: str) -> None:
        """Save a matplotlib figure in the run's folder, and log it."""
        self._keep(name, figure.savefig)

    def file(self, name: str) -> None:
        """Log a file of the run's folder, as it is when it is sent."""
        self._put({"file": name})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._put({"tags": dict(values)})

    def json(self, tree: Any, name: str) -> None:
        """Save a tree in the run's folder as JSON, and log it."""
        self._keep(name, lambda path: path.write_text(json.dumps(tree)))

    def _keep(self, name: str, write: Callable[[Path], object]) -> None:
        if not self._active:
            return
        try:
            write(Path(self._config.output) / name)
        except OSError as error:  # a full disk, which is no reason to lose the evaluation
            log.warning("%s is lost: %s", name, error)
            return
        self.file(name)

    def flush(self) -> None:
        """Wait until everything has arrived, in all (`close` included) for at most `PATIENCE_SECONDS`."""
        if not self._active:
            return
        begin = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: not len(self._outbox), self._patience)
        self._patience = max(0.0, self._patience - (time.monotonic() - begin))

    def hurry(self) -> None:
        """Nobody can wait long any more: for `HURRY_SECONDS` at most."""
        self._patience = min(self._patience, HURRY_SECONDS)

    def interrupt(self) -> None:
        """The training stops before its end, in a hurry: the run is KILLED until it goes on."""
        self.hurry()
        self._ending = "KILLED"

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run: FINISHED, KILLED after `interrupt` and at Ctrl-C, FAILED where another exception passes."""
        passed = "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self._put({"status": self._ending if kind is None else passed})
        self.close()

    def fail(self) -> None:
        """Close the run as FAILED, in a hurry; from any thread."""
        self.hurry()
        self._put({"status": "FAILED"})
        self.close()

    def close(self) -> None:
        """Deliver what is left; what does not arrive in time stays in the outbox."""
        if not self._active:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._patience)
        self._given_up = True
        if len(self._outbox):
            log.warning(
                "%d entries for MLflow could not be delivered to %s; they are kept in %s, and the same command "
                "delivers them once the server is back",
                len(self._outbox),
                self.uri,
                self._config.output,
            )

    def _told(self) -> dict[str, str]:
        """The parameters of the start before this one."""
        told: dict[str, str] = {}
        for row in self._outbox.rows:
            told |= row.get("params", {})
        return told | {key: values[-1] for key, values in self._changes().items()}

    def _changes(self) -> dict[str, list[str]]:
        """The values that resumes have given to parameters, oldest first."""
        given: dict[str, list[str]] = {}
        for row in self._outbox.rows:
            for name, value in row.get("tags", {}).items():
                if name.startswith(CHANGED):
                    given.setdefault(name.removeprefix(CHANGED), []).append(value)
        return given

    def _put(self, row: Row) -> None:
        if not self._active:
            return
        try:
            self._outbox.append(row)
        except OSError as error:
            log.warning("an entry for MLflow is lost: %s", error)
        with self._changed:
            self._changed.notify_all()

    def _deliver(self) -> None:
        away, refused, most = False, 0, VALUES_AT_ONCE
        while not self._given_up:
            with self._changed:
                self._changed.wait_for(lambda: len(self._outbox) or self._closing)
            if not len(self._outbox):
                return
            rows: list[Row] = []
            try:
                if self._client is None:
                    self._client = self._connect()
                rows = self._outbox.next(most)
                self._send(rows)
            except Exception as error:  # whatever it is, it must not reach the training
                most = 1  # of several the one that is wrong is found
                self.trouble = first_line(error)
                refused = refused + 1 if self._client is not None and _is_refusal(error) else 0
                # Asked anew each time: it may be another server by then, or have lost the run.
                self._client = None
                if not refused and rows and rows[0].keys() & {"text", "file"}:
                    self._set_aside(error)
                    continue
                if refused < TRIES:
                    if not away:
                        log.warning("MLflow at %s fails, training goes on: %s", self.uri, first_line(error))
                    away = True
                    time.sleep(RETRY_SECONDS)
                    continue
                log.warning("MLflow at %s refuses an entry, which is dropped: %s", self.uri, first_line(error))
            else:
                if away:
                    log.info("MLflow at %s answers again", self.uri)
                away, most = False, VALUES_AT_ONCE
            refused = 0
            self._outbox.arrived(len(rows))
            with self._changed:
                self._changed.notify_all()

    def _set_aside(self, error: Exception) -> None:
        """Files have a store of their own, which may be away, or not for us: nothing else is to wait for it."""
        if not self._files_wait:
            log.warning("MLflow at %s takes no files, they wait for it: %s", self.uri, first_line(error))
        self._files_wait = True
        self._outbox.set_aside()
        if self._outbox.in_order:
            return
        with self._changed:
            closing = self._closing  # which is a reason to try at once
            self._changed.wait_for(
                lambda: self._outbox.in_order or self._closing != closing, RETRY_SECONDS if closing else ASIDE_SECONDS
            )

    def _send(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        row = rows[0]
        if "status" in row:
            if row is self._outbox.rows[-1]:  # else it is that of an earlier start
                self._client.set_terminated(self.run_id, row["status"])
        elif "replaces" in row:
            # Killed before its first checkpoint: nobody goes on with it, and it would be RUNNING for ever.
            if self._client.get_run(row["replaces"]).info.status == "RUNNING":
                self._client.set_terminated(row["replaces"], "KILLED")
        elif "params" in row:
            params = [Param(key, value) for key, value in row["params"].items()]
            self._client.log_batch(self.run_id, params=params)
        elif "tags" in row:
            self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in row["tags"].items()])
        elif "text" in row:
            self._client.log_text(self.run_id, row["text"], row["name"])
        elif "file" in row:
            self._client.log_artifact(self.run_id, str(Path(self._config.output) / row["file"]))
        elif "values" in row:
            values = [Metric(name, value, r["time"], r["step"]) for r in rows for name, value in r["values"].items()]
            self._client.log_batch(self.run_id, values)

    def _connect(self) -> Any:
        """Find the run or make it; MLflow's client."""
        client = make_client(self.uri)
        if self.run_id is None or not self._has(client, self.run_id):
            self.run_id = self._create(client)
        self._outbox.address(self.uri, self.run_id)
        if self._outbox.in_order:
            client.update_run(self.run_id, status="RUNNING")
        return client

    def _has(self, client: Any, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return True
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        log.warning("%s does not know the run %s, or it was deleted: a new one is made", self.uri, run_id)
        return False

    def _create(self, client: Any) -> str:
        config = self._config
        found = client.get_experiment_by_name(config.tracking.experiment)
        if found is not None:
            experiment = found.experiment_id
        else:
            # A file store keeps artifacts beside it; a server chooses its own place.
            local = self.uri.startswith("sqlite:///")
            folder = Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
            experiment = client.create_experiment(config.tracking.experiment, folder.as_uri() if local else None)
        name = config.tracking.run_name or Path(config.output).name
        tags = _environment()
        if config.tracking.parent is not None:
            tags["mlflow.parentRunId"] = config.tracking.parent
        return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)


def _is_refusal(error: Exception) -> bool:
    """Whether it is the entry that is wrong: a name that MLflow does not take, a file that somebody has removed."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in _REFUSALS


def tracking_uri(config: Config) -> str:
    """Where runs are kept: `tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite beside the output folder.

    Of a cell of the tables it is beside the folder of its kind (`runs/mlflow.db` of `runs/ucf101-imagenet/i3d-rgb-1`):
    a report reads one store.
    """
    folder = Path(config.output).resolve().parent
    if config.tracking.cell and folder.name == Path(config.tracking.cell).parent.name:
        folder = folder.parent
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"


def _environment() -> dict[str, str]:
    tags = {"version.python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            tags[f"version.{name}"] = version(name)
    commit = source_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def source_commit() -> str | None:
    """The commit that this code is of, with `-dirty` where tracked files have changed; None if nobody knows.

    A copy of the code outside its checkout is told by REV2NET_COMMIT.
    """
    told = os.environ.get("REV2NET_COMMIT")
    if told:
        return told
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return None
