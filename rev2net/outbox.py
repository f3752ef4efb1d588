"""What is to be told to the tracking server, kept on disk until it has been: no absence and no kill loses any."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dataloaders.shards import write_atomically

Row = Mapping[str, Any]


class Outbox:
    """Rows in order, and which of them have arrived. One thread appends, one other calls the rest.

    What cannot arrive now may be set aside, so that the rows after it do not wait for it.

    Args:
        folder: of the run; the rows are in `outbox.jsonl`, what has arrived and whose they are in `outbox.json`.
        fresh: forget what an earlier run left there.

    Attributes:
        rows: all of them, those that have arrived included.
        run: store and id of the MLflow run that they go to; None before it is known.
        forgotten: the same of the earlier run, where a fresh start has forgotten it.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self._file, self._mark = folder / "outbox.jsonl", folder / "outbox.json"
        folder.mkdir(parents=True, exist_ok=True)
        state = _json(self._mark.read_bytes()) if self._mark.exists() else {}
        self.run: tuple[str, str] | None = tuple(state["run"]) if state.get("run") else None
        self.forgotten: tuple[str, str] | None = None
        if fresh:
            self._file.unlink(missing_ok=True)
            self._mark.unlink(missing_ok=True)
            self.run, self.forgotten, state = None, self.run, {}
        self._lock = threading.Lock()
        self.rows = self._read()
        self._passed = min(int(state.get("arrived", 0)), len(self.rows))  # those set aside included
        self._pending = deque(self.rows[self._passed :])
        self._aside = deque(index for index in state.get("aside", ()) if index < self._passed)
        self._from_aside = False

    def _read(self) -> list[Row]:
        if not self._file.exists():
            return []
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # a kill cut the last row off
            os.truncate(self._file, len(whole))
        return [_json(line) for line in whole.split(b"\n")[:-1]]

    def __len__(self) -> int:
        """Rows that have not arrived."""
        return len(self._pending) + len(self._aside)

    @property
    def in_order(self) -> int:
        """Those of them that were not set aside."""
        return len(self._pending)

    def append(self, row: Row) -> None:
        """Keep a row; OSError where the disk does not take it, and the row is lost."""
        size = self._file.stat().st_size if self._file.exists() else 0
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            os.truncate(self._file, size)
            raise
        with self._lock:
            self.rows.append(row)
            self._pending.append(row)

    def next(self, values: int) -> list[Row]:
        """The oldest rows that have not arrived: one, or several with at most so many values in all.

        Those that were set aside come when no other is left. IndexError where all have arrived.
        """
        self._from_aside = not self._pending
        if self._from_aside:
            return [self.rows[self._aside[0]]]
        with self._lock:
            rows = [self._pending[0]]
            room = values - len(rows[0]["values"]) if "values" in rows[0] else 0
            for row in islice(self._pending, 1, None) if room > 0 else ():
                room -= len(row.get("values", ()))
                if room < 0 or "values" not in row:
                    break
                rows.append(row)
        return rows

    def arrived(self, count: int) -> None:
        """So many rows, which `next` has given, have arrived."""
        if self._from_aside:
            self._aside.popleft()
        else:
            self._pass(count)
        self._write_mark()

    def set_aside(self) -> None:
        """The row that `next` has given shall not be waited for."""
        if self._from_aside:
            self._aside.rotate(-1)
            return
        self._aside.append(self._passed)
        self._pass(1)
        self._write_mark()

    def _pass(self, count: int) -> None:
        with self._lock:
            for _ in range(count):
                self._pending.popleft()
        self._passed += count

    def address(self, uri: str, run_id: str) -> None:
        """The run that the rows go to; all of them, where it is another one than before."""
        if self.run != (uri, run_id):
            self.run, self._passed = (uri, run_id), 0
            with self._lock:
                self._pending = deque(self.rows)
                self._aside.clear()
            self._write_mark()

    def _write_mark(self) -> None:
        state = {"run": self.run, "arrived": self._passed, "aside": list(self._aside)}
        # What is sent twice after a crash because of this arrives once: it is the same, time included.
        with contextlib.suppress(OSError):
            write_atomically(self._mark, json.dumps(state).encode())


def run_of(checkpoint: Path, saved: str | None) -> str | None:
    """The MLflow run of the training that wrote a checkpoint; None where it had none.

    Args:
        saved: what the checkpoint knows of it. The run's folder knows better: a server may have been away.
    """
    mark = checkpoint.parent.parent / "outbox.json"
    run = _json(mark.read_bytes()).get("run") if mark.exists() else None
    return str(run[1]) if run else saved


def _json(data: bytes) -> dict[str, Any]:
    """What a disk that failed has left of a line: nothing, if it cannot be read."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
