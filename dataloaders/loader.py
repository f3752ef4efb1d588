"""Training and evaluation loaders: positions to samples, samples to plans, plans to batches.

The road of a training batch: `GlobalOrder.locate` says which sample stands at a position, `train_plan` what to cut out
of it, `ShardReader.read` brings its bytes, a backend decodes, `to_batch` finishes the clip on the target device. All of
it is a function of (seed, step, rank), so that a loader starts at any step and has no state to save.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dataloaders.batch import ClipBatch, ClipRequest, RawClips, to_batch
from dataloaders.errors import DecodeError, ReadError, UserError
from dataloaders.keyed import Purpose, hash64
from dataloaders.lanes import Ahead, BackendName, Lane, make_lanes
from dataloaders.order import GlobalOrder
from dataloaders.plan import Augment, ClipShape, Views, test_views, train_plan, whole_video
from dataloaders.samples import FetchAhead, Samples
from dataloaders.shards import DataSet, SampleInfo

log = logging.getLogger(__name__)

_REPLACEMENT_TRIES = 20

FETCH_STEPS, FETCH_CLIPS, FETCH_VIDEOS = 64, 1024, 64
"""How far before the consumer the shards of a remote data set are fetched: in training the longer of so many optimizer
steps and so many clips of a rank, in an evaluation so many videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A video of the evaluation that cannot be decoded; it counts as wrong.

    Attributes:
        label: -1 where not even the sample's json can be read.
        source: as in `SampleInfo`; None there.
    """

    sample: int
    key: str
    label: int
    source: str | None
    reason: str

    @classmethod
    def of(cls, sample: int, error: DecodeError, info: SampleInfo | None) -> Failure:
        """For an error, of a sample whose description is known or not."""
        label, source = (-1, None) if info is None else (info.label, info.source)
        return cls(sample=sample, key=error.key, label=label, source=source, reason=error.reason)


class TrainLoader:
    """Endless iterator over a rank's micro-batches, from step `start_step` on.

    Step s of rank r is the slots [r*B/W, (r+1)*B/W) of global batch s (slot j stands at position s*B + j), cut into
    micro-batches front to back. A clip that fails to decode is replaced by the sample at a position of the same epoch
    that (epoch, position) alone decides.

    Args:
        dataset: the data set.
        split: its split.
        shape: of the clips.
        augment: None for clips without augmentation beyond their random position (full crop range, no flip).
        global_batch: clips of all ranks in one step.
        micro_batch: clips in one iteration on this rank.
        backend: `auto` is DALI where it can decode the data set on `device`, else PyAV.
        workers: decoding threads of this rank.
        prefetch: micro-batches that are decoded and wait, beside those that are being decoded.
        pipelines_per_gpu: DALI pipelines, taking turns (one pipeline feeds one NVDEC unit).
        with_flow: also decode the flow.
        with_rgb: False decodes the flow alone.

    Attributes:
        failures: (key, reason) of every sample that was replaced so far, in batches that were handed out.

    Raises:
        UserError: batches that do not divide, a split or flow that is not there, a backend that cannot decode it.
        RuntimeError: while iterating, when no replacement can be decoded either.
    """

    def __init__(
        self,
        dataset: DataSet,
        split: str,
        *,
        shape: ClipShape,
        augment: Augment | None,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        backend: BackendName = "auto",
        workers: int = 2,
        prefetch: int = 2,
        pipelines_per_gpu: int = 1,
        device: torch.device | str = "cpu",
        with_flow: bool = False,
        with_rgb: bool = True,
        start_step: int = 0,
    ) -> None:
        _check_batches(global_batch, micro_batch, world_size)
        self._source = Samples(dataset, split, with_flow=with_flow, with_rgb=with_rgb)
        self._order = GlobalOrder(self._source.shard_sizes, seed=seed, slices=global_batch)
        self._shape = shape
        self._augment = augment or Augment(scales=(1.0,), flip=0.0)
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank_batch = global_batch // world_size
        self._first_slot = rank * self._rank_batch
        self._device = torch.device(device)
        self._lanes = make_lanes(
            dataset,
            backend=backend,
            device=self._device,
            workers=workers,
            prefetch=prefetch,
            pipelines=pipelines_per_gpu,
            batch=micro_batch,
            shape=shape,
            with_flow=with_flow,
            with_rgb=with_rgb,
        )
        self._fetch = FetchAhead(self._source, self._order)
        # An epoch at most: the shards of a third one would push out those in use.
        steps = max(FETCH_STEPS, -(-FETCH_CLIPS // self._rank_batch))
        self._fetch_steps = min(steps, max(1, self._order.num_samples // global_batch))
        for early in range(start_step, start_step + self._fetch_steps):
            self._fetch.want(self._positions(early))
        self._ahead = Ahead(self._lanes, self._load, self._tasks(start_step), prefetch)
        self.failures: list[tuple[str, str]] = []
        self.num_samples = self._order.num_samples

    @property
    def wait_seconds(self) -> float:
        """Time that the consumer has waited for batches so far."""
        return self._ahead.wait_seconds

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        loaded = next(self._ahead)
        self.failures += loaded.failures
        return loaded.finish(self._device)

    def requests(self, positions: Iterable[int]) -> list[ClipRequest]:
        """The undecoded clips at global positions, for tools; not while the loader is iterated.

        Raises:
            DecodeError: a sample cannot be read (nothing is replaced here).
        """
        return [self._request(self._lanes[0], position, 0) for position in positions]

    def stage_seconds(self, positions: Sequence[int]) -> tuple[float, float, float]:
        """Seconds to read, to decode (with all that the backend does) and to finish one batch; as `requests`."""
        marks = [time.perf_counter()]
        requests = self.requests(positions)
        marks.append(time.perf_counter())
        raw = self._lanes[0].backend.decode(requests)
        self.synchronize()
        marks.append(time.perf_counter())
        to_batch(raw, requests, self._device)
        self.synchronize()
        marks.append(time.perf_counter())
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]

    def synchronize(self) -> None:
        """Wait until the device has finished the batches that were handed out."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Stop the threads; iterating further raises StopIteration."""
        self._fetch.close()
        if self._ahead.close():
            for lane in self._lanes:
                lane.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self, step: int) -> Iterator[range]:
        """Positions of one micro-batch after the other."""
        while True:
            self._fetch.want(self._positions(step + self._fetch_steps))
            start = self._positions(step).start
            for offset in range(0, self._rank_batch, self._micro_batch):
                yield range(start + offset, start + offset + self._micro_batch)
            step += 1

    def _positions(self, step: int) -> range:
        start = step * self._global_batch + self._first_slot
        return range(start, start + self._rank_batch)

    def _load(self, lane: Lane, positions: range) -> _Loaded:
        failures: list[tuple[str, str]] = []
        tries = [0] * len(positions)
        requests: list[ClipRequest | None] = [None] * len(positions)
        while True:
            for slot, position in enumerate(positions):
                while requests[slot] is None:
                    try:
                        requests[slot] = self._request(lane, position, tries[slot])
                    except DecodeError as error:
                        self._give_up_on(error, failures)
                        tries[slot] = self._next_try(tries[slot], error)
            ready = [request for request in requests if request is not None]
            try:
                return _Loaded.of(lane.backend.decode(ready), ready, self._device, failures)
            except DecodeError as error:
                culprits = [slot for slot, request in enumerate(ready) if request.key == error.key]
                assert culprits, f"{error.key} is not in the batch"
                for slot in culprits:
                    self._give_up_on(error, failures)
                    requests[slot] = None
                    tries[slot] = self._next_try(tries[slot], error)

    def _request(self, lane: Lane, position: int, attempt: int) -> ClipRequest:
        """The clip of a position; of a position's `attempt`-th replacement where attempt > 0."""
        if attempt:
            epoch = position // self.num_samples
            draw = hash64(Purpose.REPLACEMENT, self._seed, position, attempt) % self.num_samples
            position = epoch * self.num_samples + draw
        place = self._order.locate(position)
        info, parts = self._source.read(lane, place)
        plan = train_plan(info, self._shape, self._augment, seed=self._seed, epoch=place.epoch, sample=place.sample)
        return self._source.request(place, info, parts, plan, self._shape)

    @staticmethod
    def _give_up_on(error: DecodeError, failures: list[tuple[str, str]]) -> None:
        log.warning("sample %s cannot be decoded and is replaced: %s", error.key, error.reason)
        failures.append((error.key, error.reason))

    @staticmethod
    def _next_try(attempt: int, error: DecodeError) -> int:
        if attempt == _REPLACEMENT_TRIES:
            unread = isinstance(error, ReadError)
            raise RuntimeError(
                f"{attempt} samples in a row cannot be {'read' if unread else 'decoded'}, the last is {error}; "
                + ("look at the storage and run the same command again" if unread else "run `rev2net verify`")
            ) from error
        return attempt + 1


class EvalLoader:
    """Iterator over all test views of a rank's videos: every video of the split exactly once over all ranks.

    Rank r has the videos [r*N/W, (r+1)*N/W); nothing is padded, so ranks may have different numbers of batches, and
    the last batch is smaller. A batch may hold views of several videos. With PyAV the views of one video in one batch
    share the decoding, so a video is decoded about once; DALI decodes for each view, that is three times the frames
    for three crops.

    A video that fails to decode is never replaced: it goes to `failed` and counts as wrong, also if some of its views
    came in earlier batches. `failed` is complete when the iteration is over.

    Args:
        views: which clips of a video; with `whole`, a batch is one video and `batch_size` is not used.
        batch_size: clips in a batch.
        backwards: play every clip in reverse.
        others: as for TrainLoader.

    Raises:
        UserError: as for TrainLoader.
    """

    def __init__(
        self,
        dataset: DataSet,
        split: str,
        *,
        shape: ClipShape,
        views: Views,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 8,
        backend: BackendName = "auto",
        workers: int = 2,
        prefetch: int = 2,
        pipelines_per_gpu: int = 1,
        device: torch.device | str = "cpu",
        with_flow: bool = False,
        with_rgb: bool = True,
        backwards: bool = False,
    ) -> None:
        self._source = Samples(dataset, split, with_flow=with_flow, with_rgb=with_rgb)
        self._order = GlobalOrder(self._source.shard_sizes, seed=0, slices=1, shuffle=False)
        self._shape = shape
        self._views = views
        self._backwards = backwards
        self._batch_size = 1 if views.whole else batch_size
        self._device = torch.device(device)
        count = self._order.num_samples
        self._videos = range(rank * count // world_size, (rank + 1) * count // world_size)
        self._prefetch = prefetch
        self._fetch = FetchAhead(self._source, self._order)
        self._lanes = make_lanes(
            dataset,
            backend=backend,
            device=self._device,
            workers=workers,
            prefetch=prefetch,
            pipelines=pipelines_per_gpu,
            batch=self._batch_size,
            shape=shape,
            with_flow=with_flow,
            with_rgb=with_rgb,
        )
        self._ahead: Ahead[list[tuple[int, int]], _Loaded] | None = None
        self.failed: list[Failure] = []

    def __len__(self) -> int:
        """Batches of this rank; those whose videos all fail do not come."""
        return math.ceil(len(self._videos) * self._views.count / self._batch_size)

    def __iter__(self) -> Iterator[ClipBatch]:
        if self._ahead is not None:
            self._ahead.close(timeout=None)
        self.failed = []
        known: set[int] = set()
        self._ahead = Ahead(self._lanes, self._load, self._tasks(), self._prefetch)
        for loaded in self._ahead:
            for failure in loaded.failed:
                if failure.sample not in known:
                    known.add(failure.sample)
                    self.failed.append(failure)
                    log.warning("video %s counts as wrong: %s", failure.key, failure.reason)
            if loaded.requests:
                yield loaded.finish(self._device)

    def close(self) -> None:
        """Stop the threads; what they are at is done before the lanes close."""
        self._fetch.close()
        if self._ahead is None or self._ahead.close():
            for lane in self._lanes:
                lane.close()

    def __enter__(self) -> EvalLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self) -> Iterator[list[tuple[int, int]]]:
        """(video, view) of one batch after the other."""
        views = self._views.count
        clips = range(self._videos.start * views, self._videos.stop * views)
        wanted = self._videos.start
        for start in range(clips.start, clips.stop, self._batch_size):
            task = [divmod(clip, views) for clip in clips[start - clips.start :][: self._batch_size]]
            until = min(task[-1][0] + FETCH_VIDEOS, self._videos.stop)
            self._fetch.want(range(wanted, until))
            wanted = max(wanted, until)
            yield task

    def _load(self, lane: Lane, clips: list[tuple[int, int]]) -> _Loaded:
        requests: list[ClipRequest] = []
        failed: list[Failure] = []
        for video in sorted({video for video, _ in clips}):
            wanted = {view for other, view in clips if other == video}
            try:
                requests += self._requests(lane, video, wanted)
            except ReadError:
                raise  # an accuracy without the videos that a mount did not give would look like any other
            except DecodeError as error:
                failed.append(Failure.of(video, error, self._source.info(lane, self._order.locate(video))))
        while requests:
            try:
                raw = lane.backend.decode(requests)
                return _Loaded.of(raw, requests, self._device, [], failed)
            except DecodeError as error:
                bad = next(request for request in requests if request.key == error.key)
                failed.append(Failure.of(bad.sample, error, bad.info))
                requests = [request for request in requests if request.sample != bad.sample]
        return _Loaded(requests=[], raw=None, batch=None, failures=[], failed=failed)

    def _requests(self, lane: Lane, video: int, wanted: set[int]) -> list[ClipRequest]:
        place = self._order.locate(video)
        info, parts = self._source.read(lane, place)
        shape = self._shape
        if self._views.whole:
            plans = [whole_video(info, shape, backwards=self._backwards)]
            shape = replace(shape, frames=len(plans[0].frames))
        else:
            plans = test_views(info, shape, self._views.temporal, self._views.spatial, backwards=self._backwards)
        return [self._source.request(place, info, parts, plans[view], shape, view) for view in sorted(wanted)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A lane's result: a finished batch on the CPU, or decoded clips that the consumer finishes on its GPU."""

    requests: Sequence[ClipRequest]
    raw: RawClips | None
    batch: ClipBatch | None
    failures: list[tuple[str, str]]
    failed: list[Failure]

    @classmethod
    def of(
        cls,
        raw: RawClips,
        requests: Sequence[ClipRequest],
        device: torch.device,
        failures: list[tuple[str, str]],
        failed: list[Failure] | None = None,
    ) -> _Loaded:
        failed = failed or []
        if device.type == "cuda":
            return cls(requests=requests, raw=_pinned(raw), batch=None, failures=failures, failed=failed)
        batch = to_batch(raw, requests, device)
        return cls(requests=requests, raw=None, batch=batch, failures=failures, failed=failed)

    def finish(self, device: torch.device) -> ClipBatch:
        """The batch on the device; on a GPU the work is queued on the caller's stream."""
        if self.batch is not None:
            return self.batch
        assert self.raw is not None
        for tensor in (self.raw.frames, self.raw.flow):
            if tensor is not None and tensor.is_cuda:
                # It was made on the lane's stream: its memory must not be used again before this stream is done.
                tensor.record_stream(torch.cuda.current_stream(device))
        return to_batch(self.raw, self.requests, device)


def _pinned(raw: RawClips) -> RawClips:
    """Page-locked memory, from which a GPU copies in the background."""

    def pinned(clips: torch.Tensor | None) -> torch.Tensor | None:
        return clips if clips is None or clips.is_cuda else clips.pin_memory()

    return RawClips(frames=pinned(raw.frames), flow=pinned(raw.flow))


def _check_batches(global_batch: int, micro_batch: int, world_size: int) -> None:
    if global_batch % world_size:
        raise UserError(
            f"global batch {global_batch} does not divide over {world_size} ranks; choose a multiple of {world_size}"
        )
    if (global_batch // world_size) % micro_batch:
        raise UserError(
            f"micro batch {micro_batch} does not divide a rank's {global_batch // world_size} clips (global batch "
            f"{global_batch} over {world_size} ranks); choose a divisor"
        )
