"""Reading MLflow stores: runs, histories and artifacts, without making or changing anything."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from dataloaders.errors import UserError, first_line
from dataloaders.locks import lock
from dataloaders.shards import written_aside

CHANGED = "changed."
"""Before a key, in a tag: its value since a resume under another configuration."""

EARLIER = "earlier."
"""Before a key, in a tag: the values that it had between its first and its last, as a JSON list."""

TESTS = "rev2net.tests"
"""Tag of a test: the ids of the trainings that it tests."""

TESTED_STEPS = "tested.steps"
"""Parameter of a test: the steps at which the trainings stood, in the order of their ids."""

DEFAULT = Path("runs/mlflow.db")
"""Where the trainings of `configs/` put their runs."""

_ARTIFACTS = "mlartifacts"
"""Folder beside an SQLite store, which has the artifacts of its runs."""


def default_store() -> str:
    """MLFLOW_TRACKING_URI, else `runs/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT}"


def database(uri: str) -> Path | None:
    """The file of an SQLite store (its URI, or just its path); None of a store of another kind.

    Raises:
        UserError: there is no such file, or it holds no MLflow store.
    """
    if "://" in uri and not uri.startswith(("sqlite:", "file:")):
        return None
    path = Path(uri.removeprefix("sqlite:///"))
    if not path.is_file():
        raise UserError(
            f"there is no MLflow store at {uri}: give sqlite:///FILE of the trainings' mlflow.db or the http:// "
            "address of a server, or set MLFLOW_TRACKING_URI"
        )
    try:
        with contextlib.closing(_read_only(path)) as file:
            known = file.execute("SELECT name FROM sqlite_master WHERE name = 'experiments'").fetchone()
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be read as an SQLite database ({error}): give an MLflow store") from None
    if known is None:  # MLflow would make its tables in it
        raise UserError(f"{path} is an SQLite database, but no MLflow store: give the trainings' mlflow.db")
    return path


def _read_only(path: Path) -> sqlite3.Connection:
    """To read it; where a writer was killed in the middle, what it left is taken back first, as any writer does."""
    uri = path.resolve().as_uri()
    file = sqlite3.connect(f"{uri}?mode=ro", uri=True)
    try:
        file.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        file.close()
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        with contextlib.closing(sqlite3.connect(f"{uri}?mode=rw", uri=True)) as writer:
            writer.execute("SELECT 1 FROM sqlite_master").fetchone()
        return sqlite3.connect(f"{uri}?mode=ro", uri=True)
    return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is read of an MLflow run.

    Attributes:
        started: milliseconds since 1970.
        params: of its last start.
        first: the same, of its first start.
        earlier: values of a parameter between those two, oldest first.
        metrics: the last value of each.
        artifacts: URI of their folder.
    """

    id: str
    name: str
    status: str
    started: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    first: Mapping[str, str]
    earlier: Mapping[str, Sequence[str]]
    metrics: Mapping[str, float]
    artifacts: str

    @classmethod
    def of(cls, run: Any) -> Run:
        """From MLflow's own."""
        tags, params = dict(run.data.tags), dict(run.data.params)
        changed = {key.removeprefix(CHANGED): value for key, value in tags.items() if key.startswith(CHANGED)}
        earlier = {key.removeprefix(EARLIER): _strings(text) for key, text in tags.items() if key.startswith(EARLIER)}
        return cls(
            id=run.info.run_id,
            name=run.info.run_name or run.info.run_id,
            status=run.info.status,
            started=run.info.start_time or 0,
            tags=tags,
            params=params | changed,
            first=params,
            earlier=earlier,
            metrics=dict(run.data.metrics),
            artifacts=run.info.artifact_uri or "",
        )


def _strings(text: str) -> tuple[str, ...]:
    """A tag's JSON list; nothing where somebody has made something else of it."""
    try:
        found = json.loads(text)
    except ValueError:
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


class Store:
    """An MLflow store, opened by `reading`."""

    def __init__(self, client: Any, folder: Path | None) -> None:
        self._client = client
        self._folder = folder

    def runs(self, experiments: Sequence[str] = ()) -> list[Run]:
        """All runs that are not deleted, oldest first; only those of some experiments, where they are named.

        Raises:
            UserError: no such experiment.
        """
        known = {found.name: found.experiment_id for found in _all_pages(self._client.search_experiments)}
        for name in experiments:
            if name not in known:
                raise UserError(f"the store has no experiment {name!r}; it has {', '.join(sorted(known)) or 'none'}")
        ids = [known[name] for name in experiments or known]
        found = [Run.of(run) for run in _all_pages(self._client.search_runs, experiment_ids=ids)] if ids else []
        return sorted(found, key=lambda run: (run.started, run.id))

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in the order of the steps; of a step that was logged twice the later value."""
        if metric not in run.metrics:
            return []
        logged = self._client.get_metric_history(run.id, metric)
        return sorted({m.step: m.value for m in sorted(logged, key=lambda m: (m.step, m.timestamp))}.items())

    def artifact(self, run: Run, name: str) -> bytes | None:
        """The bytes of an artifact; None where it is not there, such as in a store that was copied without them."""
        if "://" in run.artifacts and not run.artifacts.startswith("file:"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    return Path(self._client.download_artifacts(run.id, name, folder)).read_bytes()
                except Exception:  # of whatever keeps them
                    return None
        told = Path(unquote(urlparse(run.artifacts).path))
        places = [told]
        if self._folder is not None and _ARTIFACTS in told.parts:  # copied: the path is that of another machine
            places.append(self._folder.joinpath(*told.parts[told.parts.index(_ARTIFACTS) :]))
        for place in places:
            with contextlib.suppress(OSError):
                return (place / name).read_bytes()
        return None


@contextlib.contextmanager
def reading(uri: str) -> Iterator[Store]:
    """Open a store to read it; of an SQLite file a copy, because MLflow upgrades a store of an older version in place.

    Raises:
        UserError: there is no such store, or MLflow cannot read it (with MLflow's reason).
    """
    file = database(uri)
    with tempfile.TemporaryDirectory() as folder:
        if file is not None:
            copy = Path(folder) / "mlflow.db"
            with contextlib.closing(_read_only(file)) as old, contextlib.closing(sqlite3.connect(copy)) as new:
                old.backup(new)
        client = connect(uri if file is None else f"sqlite:///{copy}", called=uri)
        from mlflow.exceptions import MlflowException

        try:
            yield Store(client, None if file is None else file.resolve().parent)
        except MlflowException as error:
            raise _unreadable(uri, error) from None


def make_client(uri: str) -> Any:
    """MLflow's client of a store: quiet, and impatient with a server (MLflow's own patience is minutes)."""
    for name, value in (
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ):
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient  # seconds to import

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it tells of every retry
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    with contextlib.ExitStack() as held:
        # MLflow makes and upgrades a store table by table: two at once, or a kill, leave one that never works again.
        with contextlib.suppress(OSError):  # no locks there, or not for us
            held.enter_context(lock(file))
            if not file.exists():
                with written_aside(file) as aside:
                    MlflowClient(f"sqlite:///{aside}")
        return MlflowClient(uri)


def connect(uri: str, *, called: str) -> Any:
    """MLflow's client of a store that answers.

    Raises:
        UserError: it does not, with the reason; it is `called` so.
    """
    try:
        client = make_client(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of whatever driver the store needs
        raise _unreadable(called, error) from None
    return client


def _unreadable(uri: str, error: Exception) -> UserError:
    reason = first_line(error).rstrip(".")
    return UserError(f"MLflow cannot read the store {uri} ({reason}): mend that, or give another store")


def _all_pages(search: Any, **words: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=1000, page_token=token, **words)
        yield from page
        token = page.token
        if not token:
            return
