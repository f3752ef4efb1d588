"""From a place in the global order to a sample's bytes, and from those to a clip request."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue

from dataloaders.batch import ClipRequest
from dataloaders.errors import DecodeError, ReadError, UserError
from dataloaders.lanes import Lane
from dataloaders.order import GlobalOrder, Location
from dataloaders.plan import ClipPlan, ClipShape
from dataloaders.shards import (
    FLOW_EXTENSION,
    INFO_EXTENSION,
    RGB_EXTENSION,
    DataSet,
    SampleInfo,
    ShardReader,
)

log = logging.getLogger(__name__)

READ_WAITS = (0.0, 0.1, 0.5, 2.0, 5.0, 10.0)
"""Seconds between one try to read from a disk or mount and the next: a clip that is replaced changes the training."""

_PAUSE = 10.0
"""Seconds without fetching ahead after an error."""


class Samples:
    """Reads the samples of a split.

    Attributes:
        remote: whether shards have to be fetched.

    Raises:
        UserError: the data set has no such split, or no flow where flow is wanted.
    """

    def __init__(self, dataset: DataSet, split: str, *, with_flow: bool, with_rgb: bool = True) -> None:
        if with_flow and not dataset.has_flow:
            raise UserError(
                f"data set {dataset.location} holds no flow, but flow is wanted; prepare it with flow or choose a "
                "configuration without a flow decoder or flow stream"
            )
        self.remote = dataset.remote
        self._shards = dataset.shards(split)
        self.shard_sizes = [shard.samples for shard in self._shards]
        wanted = {RGB_EXTENSION: with_rgb, INFO_EXTENSION: True, FLOW_EXTENSION: with_flow}
        self._extensions = tuple(extension for extension, want in wanted.items() if want)

    def read(self, lane: Lane, place: Location) -> tuple[SampleInfo, dict[str, bytes]]:
        """The sample's description and videos.

        Raises:
            DecodeError: a damaged shard or sample.
            ReadError: what the disk does not give, tried again for `READ_WAITS`; OSError where that is the opening.
        """
        key, parts = self._parts(lane, place)
        for extension in self._extensions:
            if extension not in parts:
                raise DecodeError(key, f"has no {extension} in its shard")
        info = SampleInfo.from_json(key, parts[INFO_EXTENSION])
        if min(info.num_frames, info.height, info.width) < 1:
            raise DecodeError(key, "its json speaks of a video without frames")
        for extension, told in info.sha256.items():
            # A decoder makes pictures of damaged bytes and says nothing, and nothing else would notice.
            if extension in parts and hashlib.sha256(parts[extension]).hexdigest() != told:
                raise DecodeError(key, f"its {extension} has changed since it was written (sha256 differs)")
        return info, parts

    def _parts(self, lane: Lane, place: Location) -> tuple[str, dict[str, bytes]]:
        for pause in READ_WAITS:
            try:
                return self._parts_at_once(lane, place)
            except (OSError, ReadError) as error:
                if self.remote and isinstance(error, OSError):  # fetching has its own patience
                    raise
                if pause:
                    log.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)
                if isinstance(error, ReadError):
                    # A file that a server has forgotten is stale for as long as it is open, and whole once opened anew.
                    with contextlib.suppress(OSError, UserError):
                        lane.reopen(self._shards[place.shard])
        return self._parts_at_once(lane, place)

    def _parts_at_once(self, lane: Lane, place: Location) -> tuple[str, dict[str, bytes]]:
        reader, index = self._find(lane, place)
        return _key(reader, index), reader.read(index, self._extensions)

    def fetch(self, place: Location) -> None:
        """Have the sample's shard on this machine; see `ShardInfo.fetch`."""
        self._shards[place.shard].fetch()

    def info(self, lane: Lane, place: Location) -> SampleInfo | None:
        """The description of a sample that cannot be read in full; None where its json cannot be either."""
        try:
            reader, index = self._find(lane, place)
            data = reader.read(index, (INFO_EXTENSION,))[INFO_EXTENSION]
            return SampleInfo.from_json("", data)
        except (DecodeError, LookupError):
            return None

    def _find(self, lane: Lane, place: Location) -> tuple[ShardReader, int]:
        """The sample's shard, and where it is in it."""
        shard = self._shards[place.shard]
        return lane.reader(shard), shard.first + place.index_in_shard

    def request(
        self,
        place: Location,
        info: SampleInfo,
        parts: dict[str, bytes],
        plan: ClipPlan,
        shape: ClipShape,
        view: int = 0,
    ) -> ClipRequest:
        """One clip of a sample that was read."""
        return ClipRequest(
            key=info.key,
            rgb=parts.get(RGB_EXTENSION),
            flow=parts.get(FLOW_EXTENSION),
            info=info,
            plan=plan,
            shape=shape,
            sample=place.sample,
            view=view,
        )


class FetchAhead:
    """Fetches the shards of positions that come later, so that no lane has to wait for one.

    One thread, and none for a data set that is on this machine. The thread ends with the process, also in the middle
    of a shard: one in the cache is whole or absent.
    """

    def __init__(self, source: Samples, order: GlobalOrder) -> None:
        self._source = source
        self._order = order
        self._wanted: SimpleQueue[Iterable[int]] = SimpleQueue()
        self._closed = threading.Event()
        if source.remote:
            threading.Thread(target=self._work, name="fetch-ahead", daemon=True).start()

    def want(self, positions: Iterable[int]) -> None:
        """Fetch the shards of these after those that are wanted already."""
        if self._source.remote:
            self._wanted.put(positions)

    def close(self) -> None:
        """Fetch nothing more than the shard in hand."""
        self._closed.set()
        self._wanted.put(())

    def _work(self) -> None:
        while not self._closed.is_set():
            for position in self._wanted.get():
                if self._closed.is_set():
                    return
                try:
                    self._source.fetch(self._order.locate(position))
                except (OSError, RuntimeError, UserError) as error:
                    # A lane will need the shard soon, and has more patience; what fails there is raised.
                    log.debug("not fetched ahead: %s", error)
                    self._closed.wait(_PAUSE)


def _key(reader: ShardReader, index: int) -> str:
    try:
        return reader.key(index)
    except IndexError as error:
        name = f"{reader.path.name}[{index}]"
        raise DecodeError(name, f"the shard has {len(reader)} samples, dataset.json says more") from error
