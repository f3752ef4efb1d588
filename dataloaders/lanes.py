"""Lanes: the threads that decode ahead of the consumer, and the choice of what decodes on them."""

from __future__ import annotations

import logging
import resource
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, Literal, TypeVar
from weakref import WeakSet

import torch

from dataloaders.batch import Backend
from dataloaders.errors import UserError
from dataloaders.plan import ClipShape
from dataloaders.shards import DataSet, ShardInfo, ShardReader

BackendName = Literal["auto", "dali", "pyav"]

Task = TypeVar("Task")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

STALL_SECONDS = 60.0
"""A batch that takes longer than this is spoken of, and again each time it has taken as long."""

CLOSE_SECONDS = 10.0
"""So long a loader that is closed waits for the batches under way."""

_MIN_OPEN_SHARDS, _MAX_OPEN_SHARDS = 8, 256
"""Of one lane, however many there are."""
_MAX_OPEN_ENTRIES = 100_000
"""About 15 MB of index lines. Small shards are many and cheap to open again, large ones are few."""


class Lane:
    """A backend, which other lanes may have too, and open shards of its own; used by one thread at a time."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._readers: OrderedDict[Path, ShardReader] = OrderedDict()
        self._entries = 0
        _lanes.add(self)

    def reader(self, shard: ShardInfo) -> ShardReader:
        """The shard's reader; those used longest ago are closed. Errors of `ShardInfo.open`."""
        reader = self._readers.get(shard.path)
        if reader is None:
            if shard.cache is not None:
                # What was removed from the cache would go on taking the space that it was removed for.
                for path in [path for path, other in self._readers.items() if other.removed]:
                    self._close_reader(path)
            reader = shard.open()
            self._add_reader(shard.path, reader)
        self._readers.move_to_end(shard.path)
        most = _max_open_shards()
        while len(self._readers) > 1 and (len(self._readers) > most or self._entries > _MAX_OPEN_ENTRIES):
            self._close_reader(next(iter(self._readers)))
        return reader

    def reopen(self, shard: ShardInfo) -> ShardReader:
        """A new reader in place of the shard's; where it cannot be opened the old one stays. Errors as of `reader`."""
        fresh = shard.open()
        self._close_reader(shard.path)
        self._add_reader(shard.path, fresh)
        return fresh

    def _add_reader(self, path: Path, reader: ShardReader) -> None:
        self._readers[path] = reader
        self._entries += len(reader)

    def _close_reader(self, path: Path) -> None:
        reader = self._readers.pop(path)
        self._entries -= len(reader)
        reader.close()

    def close(self) -> None:
        """Close the shards and the backend."""
        self.backend.close()
        for path in list(self._readers):
            self._close_reader(path)
        _lanes.discard(self)


_lanes: WeakSet[Lane] = WeakSet()
"""All of this process that are not closed, whatever loader has made them."""


def _max_open_shards() -> int:
    """How many shards one lane may hold open: all lanes together take half of the files that the process may open.

    That limit (`ulimit -n`, often 1024) is not raised: child processes would inherit it, and whatever calls select()
    breaks on descriptors above 1023. A shard that was closed is cheap to open again.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MAX_OPEN_SHARDS
    return min(_MAX_OPEN_SHARDS, max(_MIN_OPEN_SHARDS, files // 2 // max(1, len(_lanes))))


class Ahead(Generic[Task, Result]):
    """Iterator over `work(lane, task)` for all tasks in order; up to `ready` results wait, beside a task in each lane.

    Task i runs on lane i mod len(lanes). An exception in a lane is raised where its result would come, a task that
    does not end is named in the log. The threads belong to concurrent.futures, so that the interpreter ends with the
    tasks in hand also without `close`.
    """

    def __init__(
        self, lanes: Sequence[Lane], work: Callable[[Lane, Task], Result], tasks: Iterable[Task], ready: int
    ) -> None:
        self._lanes = lanes
        self._work = work
        self._tasks = iter(tasks)
        self._ahead = ready + len(lanes)
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"lane-{i}") for i in range(len(lanes))]
        self._under_way: deque[tuple[int, Task, Future[Result]]] = deque()
        self._idents: dict[int, int] = {}
        self._started = 0
        self._closed = False
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._closed:
            raise StopIteration
        self._fill()
        if not self._under_way:
            self.close()
            raise StopIteration
        begin = time.perf_counter()
        try:
            result = self._wait(*self._under_way[0])
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - begin
        self._under_way.popleft()
        self._fill()
        return result

    def _fill(self) -> None:
        while len(self._under_way) < self._ahead:
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            turn = self._started % len(self._lanes)
            self._started += 1
            self._under_way.append((turn, task, self._threads[turn].submit(self._run, turn, task)))

    def _run(self, turn: int, task: Task) -> Result:
        self._idents[turn] = threading.get_ident()
        return self._work(self._lanes[turn], task)

    def _wait(self, turn: int, task: Task, future: Future[Result]) -> Result:
        begin = time.perf_counter()
        while not wait([future], timeout=STALL_SECONDS).done:
            log.warning(
                "the next batch has not come for %.0f s: thread lane-%d, at work on %s, stands at %s",
                time.perf_counter() - begin,
                turn,
                task,
                _position(self._idents.get(turn)),
            )
        return future.result()

    def close(self, timeout: float | None = CLOSE_SECONDS) -> bool:
        """Drop the tasks that have not begun, and wait for those that have; whether the lanes are free then.

        What takes longer, on a storage that hangs or is slow, is left to the end of the process: a job that was told
        to stop has no time for it.
        """
        self._closed = True
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        begun = [future for *_, future in self._under_way if not future.cancelled()]
        if wait(begun, timeout).not_done:
            return False
        for thread in self._threads:
            thread.shutdown()
        return True


def _position(ident: int | None) -> str:
    """Where a thread stands: file, line and function of the innermost frame of this package."""
    frame = None if ident is None else sys._current_frames().get(ident)
    package = str(Path(__file__).parent)
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def make_lanes(
    dataset: DataSet,
    *,
    backend: BackendName,
    device: torch.device,
    workers: int,
    prefetch: int,
    pipelines: int,
    batch: int,
    shape: ClipShape,
    with_flow: bool,
    with_rgb: bool = True,
) -> list[Lane]:
    """The lanes of a loader: several over one pool of threads with PyAV, two per pipeline with DALI."""
    chosen = choose_backend(backend, dataset.codec, device)
    if chosen == "pyav":
        from dataloaders.pyav_backend import PyAVBackend

        shared: Backend = PyAVBackend(workers=workers)
        return [Lane(shared) for _ in range(max(1, min(prefetch, workers)))]
    from dataloaders.dali_backend import DALIBackend

    backends = [
        DALIBackend(
            device=device,
            batch=batch,
            threads=max(1, workers // pipelines),
            size=(shape.height, shape.width),
            with_flow=with_flow,
            with_rgb=with_rgb,
            number=number,
        )
        for number in range(pipelines)
    ]
    # While one lane of a pipeline decodes, the other reads the next batch: else a decoder would wait for the storage.
    return [Lane(backend) for _ in range(2) for backend in backends]


def choose_backend(name: BackendName, codec: str, device: torch.device) -> Literal["dali", "pyav"]:
    """Which backend decodes a codec on a device.

    Raises:
        UserError: an unknown name, or DALI is asked for where it is not installed or cannot decode the codec.
    """
    if name not in ("auto", "dali", "pyav"):
        raise UserError(f"loader.backend is {name!r}; choose auto, dali or pyav")
    if name == "pyav":
        return "pyav"
    try:
        if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
            raise UserError("DALI is not installed; install nvidia-dali-cuda120 or set loader.backend=pyav")
        from dataloaders.dali_backend import check_codec

        check_codec(codec, device)
    except UserError as reason:
        if name == "dali":
            raise
        log.info("loader: PyAV decodes on the CPU, because %s", reason)
        return "pyav"
    log.info("loader: DALI decodes %s on %s", codec, device)
    return "dali"
