"""Data sets behind URLs, through a real HTTP server, fsspec's memory and files."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.memory
import pytest
import torch
from tiny import small_disk, wait
from tiny_data import make_dataset

from dataloaders import lanes, remote
from dataloaders.bench import add_bench_arguments, run_bench
from dataloaders.browse import browse
from dataloaders.errors import DecodeError, UserError
from dataloaders.lanes import Lane
from dataloaders.loader import EvalLoader, TrainLoader
from dataloaders.plan import ClipShape, Views
from dataloaders.pyav_backend import PyAVBackend
from dataloaders.remote import DamagedShardError
from dataloaders.shards import DataSet, index_path
from dataloaders.verify import verify

SHAPE = ClipShape(frames=8, height=32, width=32)


class Handler(SimpleHTTPRequestHandler):
    """Python's own, which knows no ranges; `server` says how it misbehaves."""

    server: Server

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.server.gets.append(name)
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
        elif name == self.server.halted:
            data = (self.server.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.go_on.wait()
            self.wfile.write(data[len(data) // 2 :])
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1.

    Attributes:
        gets: names of the files that were asked for.
        failures: how many requests from now on are answered with 503.
        halted: a file whose second half waits for `go_on`.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), partial(Handler, directory=str(folder)))
        self.folder = folder
        self.gets: list[str] = []
        self.failures = 0
        self.halted = ""
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def end(self) -> None:
        self.go_on.set()
        self.shutdown()
        self.server_close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Twelve samples in four shards, with flow."""
    return make_dataset(tmp_path_factory.mktemp("local"), shard_sizes=(4, 4, 3, 1), flow_size=(32, 48))


@pytest.fixture
def server(local: DataSet, tmp_path: Path) -> Iterator[Server]:
    """A server of a copy of `local`, which a test may spoil, on a port that nobody else gets after its end."""
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))
        running = Server(Path(shutil.copytree(local.folder, tmp_path / "served")), port.getsockname()[1])
        yield running
        running.end()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where shards are cached."""
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.05, 0.1, 0.2))


def batches(dataset: DataSet, count: int = 7, **settings: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {"global_batch": 4, "micro_batch": 2, "with_flow": True, **settings}
    loader = TrainLoader(dataset, "train", shape=SHAPE, augment=None, seed=0, backend="pyav", **wanted)
    with loader:
        got = [next(loader) for _ in range(count)]
    assert not loader.failures
    return {
        "keys": [key for batch in got for key in batch.keys],
        "video": torch.cat([batch.video for batch in got]),
        "flow": torch.cat([batch.flow for batch in got if batch.flow is not None]),
    }


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["keys"] == expected["keys"]
    assert torch.equal(got["video"], expected["video"]) and torch.equal(got["flow"], expected["flow"])


def sizes(dataset: DataSet) -> list[int]:
    return [shard.bytes for shard in dataset.shards("train")]


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.tar"))


def taken(cache: Path) -> int:
    """Bytes of the shards and of what is to become one; at one moment, which no renaming or removing falls into."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in list(cache.rglob("*")) if path.suffix in (".tar", ".part"))


def until(condition: Any) -> None:
    """Wait for it; the test's time limit is the only one."""
    while not condition():
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["http", "memory", "file"])
def test_p1_batches_of_a_remote_data_set_are_those_of_a_local_one(
    local: DataSet, server: Server, cache: Path, kind: str
) -> None:
    url = {"http": server.url + "/", "memory": "memory://bucket/data", "file": local.folder.as_uri()}[kind]
    if kind == "memory":
        fsspec.filesystem("memory").put(str(local.folder), "/bucket/data", recursive=True)
    data = DataSet.open(url, cache=cache)
    assert data.fingerprint() == local.fingerprint() and data.remote and not local.remote
    assert_same(batches(data), batches(local))
    # Also from the cache alone, and by another object.
    assert_same(batches(DataSet.open(url, cache=cache)), batches(local))
    assert kept(cache) == [shard.path.name for shard in local.shards("train")]
    if kind == "http":
        assert sorted(name for name in server.gets if name.endswith(".tar")) == kept(cache)


def test_p2_an_evaluation_of_a_remote_data_set_has_every_video_once(server: Server, cache: Path) -> None:
    data = DataSet.open(server.url, cache=cache)
    with EvalLoader(data, "train", shape=SHAPE, views=Views(temporal=2, spatial=1), backend="pyav") as loader:
        assert sorted(int(sample) for batch in loader for sample in batch.sample) == sorted([*range(12)] * 2)


def test_the_index_made_of_a_fetched_tar_is_the_writer_s(local: DataSet, server: Server, cache: Path) -> None:
    data = DataSet.open(server.url, cache=cache)
    for mine, theirs in zip(data.shards("train"), local.shards("train"), strict=True):
        with mine.open() as reader, theirs.open() as expected:
            assert reader.components() == expected.components()
        assert index_path(mine.path).read_bytes() == index_path(theirs.path).read_bytes()


def test_a_small_cache_stays_small_and_serves_the_same_batches(
    local: DataSet, server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = sum(sorted(sizes(local))[-2:])
    data = DataSet.open(server.url, cache=cache, cache_gb=limit / 1e9)
    loader = TrainLoader(
        data,
        "train",
        shape=SHAPE,
        augment=None,
        seed=0,
        backend="pyav",
        global_batch=4,
        micro_batch=2,
        prefetch=1,
        with_flow=True,
    )
    seen = []
    with loader:
        for _ in range(14):
            seen += next(loader).keys
            assert taken(cache) <= limit
    assert seen == batches(local, 14)["keys"]
    assert caplog.text.count("is removed from the cache") == 1 and "into loader.cache_gb=" in caplog.text


def test_the_shard_used_longest_ago_is_removed_and_an_open_one_can_still_be_read(local: DataSet, cache: Path) -> None:
    data = DataSet.open(local.folder.as_uri(), cache=cache, cache_gb=sum(sizes(local)[:3]) / 1e9)
    shards = data.shards("train")
    lane = Lane(PyAVBackend(workers=1))
    first, second = lane.reader(shards[0]), lane.reader(shards[1])
    shards[2].fetch()
    shards[0].fetch()  # used again
    shards[3].fetch()
    assert kept(cache) == [shards[i].path.name for i in (0, 2, 3)]
    assert second.removed and not first.removed
    assert second.read(0) == _read(local, 1)
    # What was removed takes no space any more once the lane opens another.
    lane.reader(shards[2])
    with pytest.raises(OSError):
        assert second.removed
    assert lane.reader(shards[1]).read(0) == _read(local, 1)
    lane.close()


def _read(dataset: DataSet, shard: int) -> dict[str, bytes]:
    with dataset.shards("train")[shard].open() as reader:
        return reader.read(0)


def test_many_openers_at_once_keep_to_the_bound_and_read_the_right_bytes(local: DataSet, cache: Path) -> None:
    limit = sum(sorted(sizes(local))[-2:])
    expected = [_read(local, i) for i in range(4)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        shards = DataSet.open(local.folder.as_uri(), cache=cache, cache_gb=limit / 1e9).shards("train")
        for _ in range(40):
            chosen = rng.randrange(4)
            with shards[chosen].open() as reader:
                assert reader.read(0) == expected[chosen]

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(work, seed) for seed in range(6)]
        while not all(future.done() for future in running):
            assert taken(cache) <= limit
            time.sleep(0.002)
        for future in running:
            future.result()
    assert taken(cache) <= limit


def test_data_sets_of_one_cache_never_mix(local: DataSet, tmp_path: Path, cache: Path) -> None:
    other = make_dataset(tmp_path / "other", shard_sizes=(2, 2, 2, 2), flow_size=(32, 48))
    for _ in range(2):
        for dataset in (local, other):
            assert_same(batches(DataSet.open(dataset.folder.as_uri(), cache=cache)), batches(dataset))
    assert len(kept(cache)) == 8
    # They share the bound.
    small = DataSet.open(other.folder.as_uri(), cache=cache, cache_gb=max(sizes(other)) / 1e9)
    shutil.rmtree(small.folder)
    small.folder.mkdir()
    small.shards("train")[0].fetch()
    assert len(kept(cache)) == 1


def test_files_of_others_in_the_cache_folder_are_never_removed(local: DataSet, cache: Path) -> None:
    shutil.copytree(local.folder, cache / "mine")
    data = DataSet.open(local.folder.as_uri(), cache=cache, cache_gb=max(sizes(local)) / 1e9)
    for shard in data.shards("train"):
        shard.fetch()
    assert len(kept(cache / "mine")) == 4


def test_the_next_shards_are_fetched_before_they_are_needed(server: Server, cache: Path) -> None:
    data = DataSet.open(server.url, cache=cache)
    loader = TrainLoader(
        data, "train", shape=SHAPE, augment=None, seed=0, backend="pyav", global_batch=1, micro_batch=1, prefetch=1
    )
    with loader:
        next(loader)  # no more than two clips, of two shards at most, are asked for by the lanes
        until(lambda: len(kept(cache)) == 4)


WORKER = """
import sys
from dataloaders.shards import DataSet
shard = DataSet.open(sys.argv[1], cache=sys.argv[2]).shards("train")[0]
print("begin", flush=True)
with shard.open() as reader:
    print(len(reader))
"""


def start_worker(server: Server, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, server.url, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_want_one_shard_download_it_once(server: Server, cache: Path) -> None:
    server.halted = "train-000000.tar"
    workers = [start_worker(server, cache) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "begin\n"
    until(lambda: server.halted in server.gets)
    server.go_on.set()
    for worker in workers:
        assert worker.communicate()[0] == "4\n" and worker.returncode == 0
    assert server.gets.count(server.halted) == 1


def test_p8_a_kill_in_the_middle_of_a_fill_leaves_no_half_shard(server: Server, cache: Path) -> None:
    server.halted = "train-000000.tar"
    worker = start_worker(server, cache)
    until(lambda: list(cache.rglob("*.part")) and server.halted in server.gets)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert kept(cache) == [] and len(list(cache.rglob("*.part"))) == 1
    server.halted = ""
    data = DataSet.open(server.url, cache=cache)
    data.shards("train")[1].fetch()
    assert kept(cache) == ["train-000001.tar"] and len(list(cache.rglob("*.part"))) == 1
    with data.shards("train")[0].open() as reader:
        assert len(reader) == 4
    assert not list(cache.rglob("*.part"))


def test_what_a_killed_fill_left_is_removed_for_room(local: DataSet, cache: Path) -> None:
    data = DataSet.open(local.folder.as_uri(), cache=cache, cache_gb=max(sizes(local)) / 1e9)
    left = data.folder / "train-000001.tar.part"
    left.write_bytes(bytes(sizes(local)[1]))
    data.shards("train")[0].fetch()
    assert not left.exists() and kept(cache) == ["train-000000.tar"]


def test_p8_a_flipped_byte_on_the_server_is_found_and_named(server: Server, cache: Path) -> None:
    path = server.folder / "train-000002.tar"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    data = DataSet.open(server.url, cache=cache)
    with pytest.raises(DamagedShardError, match=rf"{server.url}/train-000002\.tar .*sha256"):
        batches(data)
    assert "train-000002.tar" not in kept(cache)
    until(lambda: not list(cache.rglob("*.part")))  # of what was fetched ahead
    # Twice by each of two lanes, and once ahead.
    assert 2 <= server.gets.count("train-000002.tar") <= 5
    (problem,) = verify(server.url)
    assert "train-000002.tar" in problem and "sha256" in problem
    path.write_bytes(damaged[:-512])
    (problem,) = verify(server.url)
    assert f"has {len(damaged) - 512} bytes, dataset.json says {len(damaged)}" in problem
    path.write_bytes(damaged + b"more")
    (problem,) = verify(server.url)
    assert "has more bytes" in problem


def test_p8_a_server_that_is_away_for_a_while_costs_nothing_but_time(
    local: DataSet, server: Server, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.failures = 2
    data = DataSet.open(server.url, cache=cache)
    assert caplog.text.count("503") == 2 and "trying again in 0.05 s" in caplog.text
    server.end()
    monkeypatch.setattr(remote, "WAITS", (0.1,) * 100)

    def come_back() -> Server:
        until(lambda: "ClientConnector" in caplog.text)
        return Server(server.folder, server.server_port)

    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(come_back)
        assert_same(batches(data), batches(local))
    again.result().end()


def test_p8_a_server_that_is_away_for_ever_is_one_clear_error_and_no_bad_clip(
    server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataSet.open(server.url, cache=cache)
    server.end()
    settings: dict[str, Any] = {"shape": SHAPE, "backend": "pyav"}
    loader = TrainLoader(data, "train", augment=None, seed=0, global_batch=4, micro_batch=4, **settings)
    with (
        loader,
        pytest.raises(RuntimeError, match=rf"{server.url}/train-00000\d\.tar .*tried 4 times.*Connect") as told,
    ):
        next(loader)
    assert not isinstance(told.value, DecodeError) and not loader.failures
    with EvalLoader(data, "train", views=Views(), **settings) as views, pytest.raises(RuntimeError, match="4 times"):
        next(iter(views))
    assert not views.failed
    assert "trying again" in caplog.text and "is replaced" not in caplog.text
    with pytest.raises(RuntimeError, match=r"dataset\.json cannot be fetched"):
        DataSet.open(server.url, cache=cache)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 kB."""
    with small_disk(tmp_path / "disk", "32k") as folder:
        yield folder


def test_p12_a_full_disk_of_the_cache_is_named_and_leaves_nothing_half(local: DataSet, disk: Path) -> None:
    assert sizes(local)[0] > 32_768
    shard = DataSet.open(local.folder.as_uri(), cache=disk).shards("train")[0]
    with pytest.raises(OSError, match=rf"No space left on device; lower loader\.cache_gb.*{disk}") as told:
        shard.open()
    assert told.value.errno == errno.ENOSPC
    assert not kept(disk) and not list(disk.rglob("*.part"))


def test_the_cache_may_be_named_by_a_variable_of_the_machine(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_JOB", str(tmp_path / "scratch"))
    DataSet.open(server.url, cache="$OF_THE_JOB/shards")
    assert (tmp_path / "scratch" / "shards").is_dir()
    with pytest.raises(UserError, match=r"loader\.cache=\$NOT_SET/x names a variable that is not set on"):
        DataSet.open(server.url, cache="$NOT_SET/x")


@pytest.mark.parametrize(
    "name", ["../../x.tar", "/etc/x.tar", "sub/x.tar", "..", "x\\y.tar", ".tar", "x.tar\n", "x.idx"]
)
@pytest.mark.parametrize("far", [False, True])
def test_p12_a_shard_s_name_cannot_lead_out_of_the_folder(server: Server, cache: Path, name: str, far: bool) -> None:
    manifest = json.loads((server.folder / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][1]["file"] = name
    (server.folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no plain file name"):
        DataSet.open(server.url if far else server.folder, cache=cache)


def test_p12_mistakes_about_urls_are_one_sentence(server: Server, tmp_path: Path, cache: Path, refused: Any) -> None:
    def told(command: str, location: str) -> str:
        out = [str(tmp_path / "sheet.html")] if command == "browse" else []
        return str(refused(command, location, *out))

    assert "the scheme 'nowhere'" in told("verify", "nowhere://host/data")
    assert "dataset.json does not exist" in told("browse", f"{server.url}/other")
    if find_spec("s3fs") is None:
        assert "install the package s3fs" in told("verify", "s3://bucket/data")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"cannot be made .*choose another folder with loader\.cache="):
        DataSet.open(server.url, cache=file)
    small = DataSet.open(server.url, cache=cache, cache_gb=1e-6)
    with pytest.raises(UserError, match=r"loader\.cache_gb=1e-06 is less than train-000000\.tar takes; give at least"):
        small.shards("train")[0].open()
    (server.folder / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar does not exist.*rev2net verify"):
        batches(DataSet.open(server.url, cache=cache))
    (server.folder / "dataset.json").write_text('{"format": 1, "splits": []}')
    with pytest.raises(UserError, match="damaged"):
        DataSet.open(server.url, cache=cache)


def test_the_commands_take_urls(
    server: Server, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert [problem for problem in verify(server.url) if "class" not in problem] == verify(server.folder)
    assert not kept(tmp_path / "home")  # verify looks at the server, not into a cache
    report = browse(server.url, tmp_path / "sheet.html", frames=1)
    assert (report.samples, report.failed) == (12, 0)
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    options = ["--frames", "8", "--size", "32", "--batch", "2", "--seconds", "0.05", "--device", "cpu"]
    assert run_bench(parser.parse_args([server.url, *options])) == 0
    assert "pyav" in capsys.readouterr().out
    assert len(kept(tmp_path / "home" / "rev2net")) == 4


def test_p10_a_lane_that_does_not_come_on_is_named_with_its_place(
    local: DataSet, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another holds the lock of the shard that a lane wants."""
    said = "thread lane-0, at work on range(0, 2), stands at locks.py:"
    monkeypatch.setattr(lanes, "STALL_SECONDS", 0.1)
    data = DataSet.open(local.folder.as_uri(), cache=cache)
    held = [os.open(shard.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT) for shard in data.shards("train")]
    for descriptor in held:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def release() -> None:
        with contextlib.suppress(AssertionError):
            wait(said, lambda: said in caplog.text and caplog.text.count("has not come") >= 2, 60)
        for descriptor in held:
            os.close(descriptor)

    releasing = threading.Thread(target=release)
    releasing.start()
    assert_same(batches(data, 2), batches(local, 2))
    releasing.join()
    assert said in caplog.text


def test_p12_what_one_may_not_read_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "_open", refuse)
    with pytest.raises(UserError, match=r"memory://b/k/dataset\.json is refused \(Access Denied\)"):
        DataSet.open("memory://b/k")


def test_a_limited_page_fetches_no_more_shards_than_it_shows(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", shard_sizes=(5, 3))
    data.shards("train")[1].path.unlink()
    browse(data.folder, tmp_path / "page.html", limit=5)
