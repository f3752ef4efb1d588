from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tiny_data import make_dataset

from dataloaders.errors import DecodeError, ReadError
from dataloaders.lanes import Lane
from dataloaders.order import Location
from dataloaders.pyav_backend import PyAVBackend
from dataloaders.samples import Samples
from dataloaders.shards import ShardReader


@pytest.mark.parametrize("extension", ["mp4", "flow.mp4"])
def test_p8_a_video_that_has_changed_in_its_shard_is_no_clip(extension: str, tmp_path: Path) -> None:
    """A decoder would make pictures of it without a word."""
    data = make_dataset(tmp_path, shard_sizes=(2,), flow_size=(32, 48))
    (shard,) = data.shards("train")
    with ShardReader(shard.path) as reader:
        key, whole = reader.key(1), reader.read(1)
        ((offset, size),) = [entry[1:] for entry in reader.components() if entry[0] == f"{key}.{extension}"]
    with shard.path.open("r+b") as file:
        file.seek(offset + size - 20)
        file.write(bytes([whole[extension][size - 20] ^ 1]))
    samples = Samples(data, "train", with_flow=True)
    lane = Lane(PyAVBackend(workers=1))
    first, second = (Location(sample=i, shard=0, index_in_shard=i, epoch=0) for i in range(2))
    assert samples.read(lane, first)[0].label == 0
    with pytest.raises(DecodeError, match=rf"{key}: its {extension} has changed since it was written"):
        samples.read(lane, second)
    info = samples.info(lane, second)
    assert info is not None and info.label == 1
    # What is not wanted is not looked at.
    other = Samples(data, "train", with_flow=extension == "mp4", with_rgb=extension == "flow.mp4")
    assert other.read(lane, second)[0].label == 1
    lane.close()


def test_p8_a_file_that_its_server_has_forgotten_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path, shard_sizes=(2,), flow_size=None)
    samples, lane = Samples(data, "train", with_flow=False), Lane(PyAVBackend(workers=1))
    place = Location(sample=0, shard=0, index_in_shard=0, epoch=0)
    (shard,) = data.shards("train")
    before, read = lane.reader(shard), os.pread

    def stale(descriptor: int, size: int, offset: int) -> bytes:
        if lane.reader(shard) is before:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", stale)
    monkeypatch.setattr("dataloaders.samples.READ_WAITS", (0.0,))
    with monkeypatch.context() as gone:
        gone.setattr(Path, "is_file", lambda _: False)
        with pytest.raises(ReadError, match="Stale file handle"):
            samples.read(lane, place)
    assert samples.read(lane, place)[0].label == 0 and lane.reader(shard) is not before
    lane.close()


@pytest.mark.parametrize("call", ["pread", "open"])
def test_p8_a_storage_that_is_away_for_a_moment_changes_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path, shard_sizes=(2,), flow_size=None)
    samples, lane = Samples(data, "train", with_flow=False), Lane(PyAVBackend(workers=1))
    place, real, away = Location(sample=0, shard=0, index_in_shard=0, epoch=0), getattr(os, call), [True] * 3

    def fails(*args: object) -> object:
        if away:
            away.pop()
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr("dataloaders.samples.READ_WAITS", (0.0, 0.01, 0.01))
    monkeypatch.setattr(os, call, fails)
    assert samples.read(lane, place)[0].label == 0 and not away
    away = [True] * 4
    lane.close()
    fresh = Lane(PyAVBackend(workers=1))
    with pytest.raises((ReadError, OSError), match="Input/output error"):
        samples.read(fresh, place)
    fresh.close()
