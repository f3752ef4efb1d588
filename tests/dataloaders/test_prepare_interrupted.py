"""Preparations that are killed, shared out, or run out of disk. `make chaos` has a longer form of the kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from clips import contents, make_source, moving, write_video
from tiny import small_disk, wait

from dataloaders.errors import UserError
from dataloaders.locks import lock
from dataloaders.prepare import prepare, prepare_share
from dataloaders.shards import DataSet
from dataloaders.sources import SourceClip, read_folder
from dataloaders.transcode import PrepareSettings, transcode
from dataloaders.verify import verify
from rev2net.cli import main

SMALL = PrepareSettings(short_side=64)
NO_FLOW = PrepareSettings(short_side=64, flow_scale=None)


def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "in", clips=5, frames=20)
    prepare(read_folder(source), tmp_path / "whole", SMALL)
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from dataloaders.prepare import prepare;"
        "from dataloaders.sources import read_folder; from dataloaders.transcode import PrepareSettings;"
        "prepare(read_folder(Path(sys.argv[1])), Path(sys.argv[2]), PrepareSettings(short_side=64))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], cwd=root)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".work/samples/*/*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {f.stem for f in out.glob(".work/samples/*/*.json")}
    assert done and not (out / "dataset.json").exists()
    with pytest.raises(UserError, match=r"no dataset\.json"):
        DataSet.open(out)
    listing, work = read_folder(source), Mock(wraps=transcode)
    monkeypatch.setattr("dataloaders.prepare.transcode", work)
    prepare(listing, out, SMALL)
    assert sorted(call.args[0].key for call in work.call_args_list) == sorted({c.key for c in listing.clips} - done)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_end_between_two_shards_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = read_folder(make_source(tmp_path / "in"), val_fraction=0)
    settings = PrepareSettings(short_side=64, flow_scale=None, shard_bytes=8_000)
    prepare(listing, tmp_path / "whole", settings)
    replace = Path.replace

    def die_at_the_second_shard(self: Path, target: Path) -> Path:
        if target.name == "train-000001.tar":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die_at_the_second_shard)
        prepare(listing, tmp_path / "out", settings)
    first = (tmp_path / "out/train-000000.tar").stat().st_mtime_ns
    prepare(listing, tmp_path / "out", settings)
    assert (tmp_path / "out/train-000000.tar").stat().st_mtime_ns == first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shares_in_any_order_end_with_the_bytes_of_one_run(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for i in range(5):
        write_video(source / "run" / f"{i}.mp4", moving(6, step=1 + i))
    (source / "run" / "bad.mp4").write_bytes(b"no video")
    listing = read_folder(source, val_fraction=0.4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare(listing, whole, SMALL)
    assert prepare_share(listing, parts, SMALL, (3, 3))[0] == 2
    assert prepare_share(listing, parts, SMALL, (1, 3))[0] == 2
    assert not (parts / "dataset.json").exists()
    # The second share never ran; the run without a share does its part.
    report = prepare(listing, parts, SMALL)
    assert report.finished and not report.already
    assert contents(parts) == contents(whole)
    # A task that comes late finds all done, and changes nothing.
    assert prepare_share(listing, parts, SMALL, (2, 3)) == (2, ())
    assert sorted(f.name for f in parts.iterdir()) == sorted(f.name for f in whole.iterdir())
    with pytest.raises(UserError, match=r"other settings: flow_scale 0\.5"):
        prepare_share(listing, parts, NO_FLOW, (1, 3))


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "import time; from dataloaders.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(2) as pool:\n"
        "        list(pool.map(time.sleep, [0, 0.2, 0.2])); print(*pool._processes, flush=True)\n"
        "        pool.submit(time.sleep, 300).result()"
    )
    (tmp_path / "pool.py").write_text(code)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    workers = process.stdout.readline().split()
    assert len(workers) == 2 and all(running(pid) for pid in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait("the workers' end after their parent's", lambda: not any(running(pid) for pid in workers), 60)


def running(pid: str) -> bool:
    """Is there such a process, and not only its exit status?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_folder_that_another_process_prepares_into_is_left_alone(tmp_path: Path) -> None:
    listing, out = read_folder(make_source(tmp_path / "in"), val_fraction=0), tmp_path / "out"
    settings = PrepareSettings(short_side=64, flow_scale=None)
    prepare_share(listing, out, settings, (1, 2))
    before = contents(out)
    with lock(out / ".work" / "prepare"), pytest.raises(UserError, match="another process prepares into"):
        prepare(listing, out, settings)
    assert {name: data for name, data in contents(out).items() if not name.endswith(".lock")} == before
    assert prepare(listing, out, settings).prepared == {"train": 6} and verify(out) == []


def test_a_source_that_is_gone_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that is lost on the way: none of its clips is bad, and what is done stays."""
    source = make_source(tmp_path / "in", clips=2)
    listing, out = read_folder(source, val_fraction=0), tmp_path / "out"
    settings = PrepareSettings(short_side=64, flow_scale=None)

    def lose(clip: SourceClip, settings: PrepareSettings) -> dict[str, bytes]:
        if clip.class_name == "run":
            (source / "run").rename(tmp_path / "elsewhere")
        return transcode(clip, settings)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="was there when the clips were listed"):
        patch.setattr("dataloaders.prepare.transcode", lose)
        prepare(listing, out, settings, max_bad=1)
    assert len(list(out.rglob("jump*.json"))) == 2
    (tmp_path / "elsewhere").rename(source / "run")
    report = prepare(listing, out, settings)
    assert report.prepared == {"train": 4} and report.quarantined == ()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_full_disk_is_named_and_the_next_run_goes_on(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in", clips=5, frames=30)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(960_000))
    out = disk / "data"
    words = ["prepare", "folder", str(source), str(out), "--short-side", "64", "--workers", "1"]
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said and str(out) in said and "run the same command again" in said
    assert not (out / "dataset.json").exists() and not list(out.rglob("*.tmp"))
    done = len(list(out.rglob("*.json"))) - 1
    assert done > 0
    ballast.unlink()
    assert main(words) == 0
    assert f"{done} clips are done already" in capsys.readouterr().err
    assert verify(out) == []


def test_a_disk_that_fills_while_shards_are_written_leaves_no_part_of_one(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "in", clips=5, frames=30)
    words = ["prepare", "folder", str(source), "--short-side", "64", "--workers", "1"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    ballast = disk / "ballast"
    # Room for the samples, each file of which takes whole pages, and for a part of the shards.
    ballast.write_bytes(bytes(2**20 - int(1.4 * size) - 60_000))
    out = disk / "data"
    assert main([*words, str(out)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said and f"{out}/" in said and ".tar" in said
    assert not (out / "dataset.json").exists() and not list(out.glob("*.tmp"))
    ballast.unlink()
    assert main([*words, str(out)]) == 0
    assert contents(out) == contents(tmp_path / "whole")
