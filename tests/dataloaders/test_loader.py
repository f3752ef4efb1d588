from __future__ import annotations

import argparse
import errno
import itertools
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from weakref import WeakSet

import numpy as np
import pytest
import torch
from tiny_data import make_dataset

from dataloaders import lanes
from dataloaders.bad_clips import BadClips
from dataloaders.batch import ClipBatch, to_batch
from dataloaders.bench import add_bench_arguments, bench_loader, run_bench
from dataloaders.dali_backend import DALIBackend
from dataloaders.errors import ReadError, UserError
from dataloaders.lanes import Lane, choose_backend
from dataloaders.loader import EvalLoader, TrainLoader
from dataloaders.plan import IDENTITY_COLOUR, Augment, ClipShape, Views
from dataloaders.pyav_backend import PyAVBackend
from dataloaders.samples import Samples
from dataloaders.shards import DataSet, index_path

SHAPE = ClipShape(frames=8, height=32, width=32)
JITTER = Augment(brightness=0.2, hue=0.1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Ten samples in three shards, with half-size flow."""
    return make_dataset(tmp_path_factory.mktemp("tiny"), shard_sizes=(4, 5, 1), flow_size=(32, 48))


def train(dataset: DataSet, **settings: Any) -> TrainLoader:
    wanted = {
        "shape": SHAPE,
        "augment": JITTER,
        "seed": 0,
        "global_batch": 4,
        "micro_batch": 4,
        "backend": "pyav",
        **settings,
    }
    return TrainLoader(dataset, "train", **wanted)


def take(loader: TrainLoader, count: int) -> list[ClipBatch]:
    with loader:
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def join(batches: Iterable[ClipBatch]) -> dict[str, Any]:
    parts = list(batches)
    joined: dict[str, Any] = {"keys": [key for part in parts for key in part.keys]}
    for name in ("video", "flow", "label", "sample", "view"):
        joined[name] = torch.cat([getattr(part, name) for part in parts])
    return joined


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["keys"] == expected["keys"]
    for name in ("video", "flow", "label", "sample", "view"):
        assert torch.equal(got[name], expected[name]), name


def all_ranks(dataset: DataSet, world: int, steps: int, **settings: Any) -> dict[str, Any]:
    """The global batches of some steps, put together from the loaders of all ranks."""
    per_step = settings["global_batch"] // world // settings["micro_batch"]
    ranks = [
        take(train(dataset, with_flow=True, world_size=world, rank=rank, **settings), steps * per_step)
        for rank in range(world)
    ]
    return join(
        batch
        for step, rank in itertools.product(range(steps), range(world))
        for batch in ranks[rank][step * per_step : (step + 1) * per_step]
    )


@pytest.mark.parametrize("batch", [4, 8, 12])
def test_p1_global_batches_depend_on_nothing_else(dataset: DataSet, batch: int) -> None:
    """18 combinations with world size and workers, and as many of micro-batch and prefetch as there is room for."""
    steps = 2
    expected = all_ranks(dataset, 1, steps, global_batch=batch, micro_batch=batch, workers=1, prefetch=1)
    assert expected["video"].shape == (steps * batch, 3, 8, 32, 32)
    assert expected["flow"].shape == (steps * batch, 2, 8, 32, 32)
    for number, (world, workers) in enumerate(itertools.product((1, 2, 4), (1, 3))):
        divisors = [micro for micro in (1, 2, 3, 4, 6) if batch // world % micro == 0]
        micro = divisors[number % len(divisors)]
        settings = {"global_batch": batch, "micro_batch": micro, "workers": workers, "prefetch": 1 + number % 4}
        got = all_ranks(dataset, world, steps, **settings)
        assert_same(got, expected)


@pytest.mark.parametrize("pipelines", [1, 2])
def test_p3_dali_gives_the_batches_of_pyav(dataset: DataSet, pipelines: int) -> None:
    pyav = join(take(train(dataset, with_flow=True, micro_batch=2), 8))
    dali = join(take(train(dataset, with_flow=True, micro_batch=2, backend="dali", pipelines_per_gpu=pipelines), 8))
    assert dali["keys"] == pyav["keys"] and torch.equal(dali["label"], pyav["label"])
    assert (dali["video"] - pyav["video"]).abs().mean() < 2 / 127.5
    assert (dali["flow"] - pyav["flow"]).abs().mean() < 1 / 127


@pytest.mark.parametrize("pipelines", [1, 3])
def test_p1_dali_batches_do_not_depend_on_threads_or_pipelines(dataset: DataSet, pipelines: int) -> None:
    settings: dict[str, Any] = {"with_flow": True, "backend": "dali"}
    expected = join(take(train(dataset, **settings), 3))
    got = take(train(dataset, micro_batch=1, workers=3, pipelines_per_gpu=pipelines, **settings), 12)
    assert_same(join(got), expected)


def test_the_next_batch_is_read_while_the_only_pipeline_decodes(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch is decoded once all samples of the second one are read."""
    reads, both = itertools.count(1), threading.Event()
    read, decode = Samples.read, DALIBackend._run

    def counted(*args: Any) -> Any:
        got = read(*args)
        if next(reads) == 8:
            both.set()
        return got

    def late(*args: Any) -> Any:
        assert both.wait(60)
        return decode(*args)

    monkeypatch.setattr(Samples, "read", counted)
    monkeypatch.setattr(DALIBackend, "_run", late)
    assert len(take(train(dataset, backend="dali", prefetch=1), 2)) == 2


@pytest.mark.parametrize(("batch", "world"), [(5, 1), (10, 2), (4, 2), (12, 4), (6, 3)])
def test_p2_every_epoch_visits_every_sample_once_whether_the_batch_divides_it_or_not(
    dataset: DataSet, batch: int, world: int
) -> None:
    """Ten samples: batches of 4, 6 and 12 straddle epochs."""
    settings = {"global_batch": batch, "micro_batch": batch // world}
    samples = all_ranks(dataset, world, -(-30 // batch), **settings)["sample"].tolist()
    epochs = [samples[:10], samples[10:20], samples[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_a_loader_of_flow_alone_gives_the_same_flow(dataset: DataSet, backend: Any) -> None:
    settings: dict[str, Any] = {"with_flow": True, "micro_batch": 2, "backend": backend}
    both, flow = (take(train(dataset, with_rgb=rgb, **settings), 4) for rgb in (True, False))
    for one, other in zip(both, flow, strict=True):
        assert torch.equal(one.stream("flow"), other.stream("flow")) and one.keys == other.keys
        assert one.video is not None and other.video is None


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_segments_come_from_all_over_the_video(dataset: DataSet, backend: Any) -> None:
    """Each frame of the batch is the one that a clip of that frame alone shows."""
    settings: dict[str, Any] = {"backend": backend, "micro_batch": 2}
    spread = ClipShape(frames=4, height=SHAPE.height, width=SHAPE.width, segments=4)
    video = join(take(train(dataset, shape=spread, with_flow=True, **settings), 2))["video"]
    loader = train(dataset, shape=spread, **settings)
    requests = loader.requests(range(4))
    alone = replace(spread, frames=1, segments=0)
    for row, request in enumerate(requests):
        for t, frame in enumerate(request.plan.frames):
            one = replace(request, shape=alone, plan=replace(request.plan, frames=(frame,)))
            single = to_batch(PyAVBackend(workers=1).decode([one]), [one], "cpu").stream("rgb")
            assert (video[row, :, t] - single[0, :, 0]).abs().mean() < 2 / 127.5
    loader.close()


def test_p4_a_loader_that_starts_at_a_step_goes_on_as_if_it_had_never_stopped(dataset: DataSet) -> None:
    whole = take(train(dataset, with_flow=True, micro_batch=2), 12)
    resumed = take(train(dataset, with_flow=True, micro_batch=2, start_step=4), 4)
    assert_same(join(resumed), join(whole[8:]))


def test_labels_and_samples_belong_to_the_keys(dataset: DataSet) -> None:
    batch = join(take(train(dataset, with_flow=True), 3))
    assert batch["keys"] == [f"clip{sample:03d}" for sample in batch["sample"].tolist()]
    assert batch["label"].tolist() == [sample % 3 for sample in batch["sample"].tolist()]


def test_without_augmentation_the_crop_is_the_largest(dataset: DataSet) -> None:
    loader = train(dataset, augment=None)
    plans = [request.plan for request in loader.requests(range(20))]
    (batch,) = take(loader, 1)
    assert batch.flow is None and batch.video.shape == (4, 3, 8, 32, 32)
    for plan in plans:  # of 64x96
        assert not plan.flip and plan.colour == IDENTITY_COLOUR and plan.crop[2:] == (64, 64)


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_p8_a_bad_training_sample_is_replaced_by_its_position_alone(tmp_path: Path, backend: str) -> None:
    broken = make_dataset(tmp_path, broken={3, 7})
    settings: dict[str, Any] = {"backend": backend}
    loader = train(broken, **settings)
    batches = take(loader, 6)
    samples = [sample for batch in batches for sample in batch.sample.tolist()]
    assert len(samples) == 24 and not {3, 7} & set(samples)
    assert {key for key, _ in loader.failures} == {"clip003", "clip007"}
    assert all(reason for _, reason in loader.failures)
    other = train(broken, micro_batch=1, workers=1, start_step=3, **settings)
    assert [int(batch.sample) for batch in take(other, 12)] == samples[12:]


def test_p8_what_the_disk_does_not_give_is_replaced_in_training_and_ends_an_evaluation(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mount that is lost in the middle; an accuracy without those videos would look like any other."""
    read = os.pread

    def lost(descriptor: int, size: int, offset: int) -> bytes:
        if offset > 0 and Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == "train-000000.tar":
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", lost)
    monkeypatch.setattr("dataloaders.samples.READ_WAITS", (0.0,))
    loader = train(dataset)
    assert sum(map(len, take(loader, 3))) == 12
    assert loader.failures and all("Input/output error" in reason for _, reason in loader.failures)
    with (
        EvalLoader(dataset, "train", shape=SHAPE, views=Views.parse("1x1"), backend="pyav") as test,
        pytest.raises(ReadError, match=r"clip\d+: train-000000\.tar: .*Input/output error"),
    ):
        list(test)


def test_p8_too_many_bad_clips_of_the_last_thousand_end_a_run_and_few_never_do() -> None:
    few = BadClips(0.01)
    for _ in range(4):
        few.add(1, 1)  # 4 of 4
    with pytest.raises(RuntimeError, match=r"5 of the last 5 clips cannot be decoded.*loader\.max_bad=0\.01.*verify"):
        few.add(1, 1)
    many = BadClips(0.01)
    for step in range(1000):
        many.add(int(step % 10 == 0), 16)  # 1 of 160: 6 or 7 of the last thousand or so
    many.add(12, 16)
    with pytest.raises(RuntimeError, match=r"2\d of the last 100\d clips"):
        many.add(6, 16)
    # A run that goes on has seen others before.
    resumed = BadClips(0.01, seen=5000)
    resumed.add(16, 16)
    with pytest.raises(RuntimeError, match=r"24 of the last 1000 clips"):
        resumed.add(8, 16)
    # Half of what is allowed, by chance, over as many steps as 50 epochs of a large data set have; and twice as much.
    chance = np.random.default_rng(0)
    for batch, steps in ((2048, 6000), (64, 20_000)):
        lucky, unlucky = BadClips(0.01), BadClips(0.01)
        for bad in chance.binomial(batch, 0.005, steps):
            lucky.add(int(bad), batch)
        with pytest.raises(RuntimeError):
            for bad in chance.binomial(batch, 0.02, 1000):
                unlucky.add(int(bad), batch)
    # What is longer ago than a thousand clips is forgotten.
    forgiven = BadClips(0.01)
    for _ in range(20):
        forgiven.add(0, 50)
    for _ in range(3):
        forgiven.add(9, 50)
        for _ in range(20):
            forgiven.add(0, 50)


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_p8_a_failed_video_of_an_evaluation_is_listed_and_not_replaced(tmp_path: Path, backend: Any) -> None:
    broken = make_dataset(tmp_path, broken={0, 5})
    _cut_last_sample(broken)
    views = Views(temporal=2, spatial=1)
    with EvalLoader(broken, "train", shape=SHAPE, views=views, batch_size=3, backend=backend) as loader:
        for _ in range(2):
            seen = [int(sample) for batch in loader for sample in batch.sample]
            assert sorted(seen) == sorted([*range(1, 5), *range(6, 11)] * 2)
            assert [(f.sample, f.key, f.label) for f in loader.failed] == [
                (0, "clip000", 0),
                (5, "clip005", 2),
                (11, "clip011", 2),
            ]


def _cut_last_sample(dataset: DataSet) -> None:
    """As a disk that was full would leave it."""
    shard = dataset.shards("train")[-1].path
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 11_000)


@pytest.mark.parametrize("world", [1, 2, 3, 13])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_p2_evaluation_has_every_view_of_every_video_once(dataset: DataSet, world: int, batch_size: int) -> None:
    seen: list[tuple[int, int]] = []
    for rank in range(world):
        loader = EvalLoader(
            dataset,
            "train",
            shape=SHAPE,
            views=Views.parse("2x3"),
            rank=rank,
            world_size=world,
            batch_size=batch_size,
            backend="pyav",
        )
        with loader:
            batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            seen += zip(batch.sample.tolist(), batch.view.tolist(), strict=True)
    assert sorted(seen) == [(sample, view) for sample in range(10) for view in range(6)]


def test_views_do_not_depend_on_the_batches_they_come_in(dataset: DataSet) -> None:
    def clips(batch_size: int, backend: Any) -> torch.Tensor:
        with EvalLoader(
            dataset, "train", shape=SHAPE, views=Views.parse("2x3"), batch_size=batch_size, backend=backend
        ) as loader:
            return torch.cat([batch.video for batch in loader])

    assert torch.equal(clips(4, "pyav"), clips(7, "pyav"))
    assert (clips(6, "dali") - clips(6, "pyav")).abs().mean() < 2 / 127.5


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_whole_videos_come_one_by_one(dataset: DataSet, backend: Any) -> None:
    with EvalLoader(
        dataset, "train", shape=SHAPE, views=Views.parse("whole"), backend=backend, with_flow=True
    ) as loader:
        lengths = [batch.video.shape[2] for batch in loader]
    assert lengths == [24, 32, 16] * 3 + [24]


def test_backwards_plays_every_clip_in_reverse(dataset: DataSet) -> None:
    def first(backwards: bool) -> torch.Tensor:
        with EvalLoader(
            dataset, "train", shape=SHAPE, views=Views.parse("1x1"), backend="pyav", backwards=backwards
        ) as loader:
            return next(iter(loader)).video

    assert torch.equal(first(True), first(False).flip(2))


def test_an_error_in_a_lane_is_raised_in_the_consumer_and_leaves_no_thread(tmp_path: Path) -> None:
    gone = make_dataset(tmp_path)
    before = threading.active_count()
    for shard in gone.shards("train"):
        shard.path.unlink()
    loader = train(gone)
    with pytest.raises(UserError, match="is missing"):
        next(loader)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_a_process_ends_cleanly_also_when_the_loader_was_not_closed(dataset: DataSet, backend: str) -> None:
    script = f"""
from dataloaders.loader import TrainLoader
from dataloaders.plan import ClipShape
from dataloaders.shards import DataSet
loader = TrainLoader(DataSet.open({str(dataset.folder)!r}), "train", shape=ClipShape(frames=8, height=32, width=32),
    augment=None, seed=0, global_batch=2, micro_batch=1, backend={backend!r}, prefetch=4)
print(next(loader).keys)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "clip" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(("limit", "value"), [("_MAX_OPEN_SHARDS", 2), ("_MAX_OPEN_ENTRIES", 9)])
def test_a_lane_closes_the_shards_used_longest_ago(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    four, five, one = dataset.shards("train")
    lane = Lane(PyAVBackend(workers=1))
    monkeypatch.setattr(lanes, limit, value)
    kept, closed = lane.reader(four), lane.reader(one)
    assert lane.reader(four) is kept and lane.reader(one) is closed and lane.reader(four) is kept
    lane.reader(five)
    assert lane.reader(four) is kept and kept.read(3) and not kept.removed
    with pytest.raises(OSError):
        assert closed.removed
    monkeypatch.setattr(lanes, "_MAX_OPEN_ENTRIES", 0)
    assert lane.reader(five).read(4) and lane.reader(one).read(0)  # the one in use stays open
    lane.close()


def test_all_lanes_together_hold_open_half_of_the_files_that_the_process_may_open(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = dataset.shards("train")[0]
    shards = [replace(first, path=tmp_path / f"{i}.tar") for i in range(40)]
    for shard in shards:
        shard.path.symlink_to(first.path)
        index_path(shard.path).symlink_to(index_path(first.path))

    def held() -> int:
        return sum(Path(file).resolve() == first.path.resolve() for file in Path("/proc/self/fd").iterdir())

    monkeypatch.setattr(lanes, "_lanes", WeakSet())
    monkeypatch.setattr(resource, "getrlimit", lambda _: (60, 4096))
    before, (one, two) = held(), [Lane(PyAVBackend(workers=1)) for _ in range(2)]
    for shard in shards:
        assert one.reader(shard).read(0) == two.reader(shard).read(0)
    assert held() - before == 30
    two.close()
    for shard in shards:
        one.reader(shard)
    assert held() - before == 30
    one.close()
    assert held() == before


def test_bench_measures_both_backends_beside_their_decoders(
    dataset: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Mock(wraps=bench_loader)
    monkeypatch.setattr("dataloaders.bench.bench_loader", measure)
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    options = ["--frames", "8", "--size", "32", "--batch", "2", "--seconds", "0.1", "--device", "cpu"]
    more = ["--flow", "--segments", "4", "--pipelines", "2"]
    assert run_bench(parser.parse_args([str(dataset.folder), *more, *options])) == 0
    asked = measure.call_args.kwargs
    assert (asked["shape"].segments, asked["pipelines_per_gpu"], asked["with_flow"]) == (4, 2, True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["backend", "dali", "pyav"]
    assert all(float(number) > 0 for line in lines[1:] for number in line.split()[1:3])
    for line in lines[1:]:
        parts = [int(part) for part in re.findall(r"(\d+)%", line.partition("read ")[2])]
        assert len(parts) == 4 and sum(parts) in range(98, 103), line
    plain = make_dataset(tmp_path, shard_sizes=(2,), codec="h264")
    assert run_bench(parser.parse_args([str(plain.folder), *options])) == 0
    assert "--codec vp9" in capsys.readouterr().out.splitlines()[1]


def test_waiting_is_measured(dataset: DataSet) -> None:
    loader = train(dataset)
    assert loader.wait_seconds == 0
    take(loader, 2)
    assert loader.wait_seconds > 0


def test_auto_takes_dali_where_it_can_decode(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert choose_backend("auto", "vp9", torch.device("cpu")) == "dali"
    assert choose_backend("auto", "h264", torch.device("cpu")) == "pyav"
    assert choose_backend("auto", "h264", torch.device("cuda")) == "dali"
    assert "DALI decodes vp9" in caplog.text and "PyAV decodes on the CPU" in caplog.text


def test_p12_user_errors_say_what_to_do(dataset: DataSet, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"world_size": 3}, "multiple of 3"),
        ({"micro_batch": 3}, "choose a divisor"),
        ({"backend": "opencv"}, "choose auto, dali or pyav"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            train(dataset, **settings)
    plain = make_dataset(tmp_path, shard_sizes=(1,), codec="h264")
    with pytest.raises(UserError, match="holds no flow"):
        train(plain, with_flow=True)
    with pytest.raises(UserError, match="vp9"):
        train(plain, backend="dali")
    with pytest.raises(UserError, match="no split 'test'"):
        EvalLoader(plain, "test", shape=SHAPE, views=Views())


def test_h264_works_with_auto(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path, shard_sizes=(2,), codec="h264")
    (batch,) = take(train(plain, backend="auto", shape=replace(SHAPE, stride=2)), 1)
    assert batch.video.shape == (4, 3, 8, 32, 32)


def test_p7_a_batch_that_does_not_come_holds_up_no_end() -> None:
    """A job that was told to stop has no time for a storage that hangs."""
    arrives = threading.Event()
    batches = lanes.Ahead([Mock(), Mock()], lambda _, task: task and arrives.wait(60), iter(range(9)), 2)
    next(batches)
    assert not batches.close(timeout=0.2)
    arrives.set()
    assert batches.close() and list(batches) == []
