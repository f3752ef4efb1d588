"""Preparation killed again and again: `make chaos`. The suite has a short form in test_prepare_interrupted.py."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import contents, moving, write_video

from dataloaders.verify import verify

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
CLIPS = 60


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = ("prepare", "folder", source, out, "--short-side", 64, "--workers", 2, "--shard-mb", 0.1)
    # A group of its own: the kill takes the workers too, as a machine that goes down does.
    return subprocess.Popen(
        [sys.executable, "-m", "rev2net", *map(str, command)],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path: Path, record: Callable[[str, str, str], None]) -> None:
    source = tmp_path / "in"
    for i in range(CLIPS):
        write_video(source / f"class{i % 4}" / f"{i}.mp4", moving(24, 64, 96, step=1 + i % 5, seed=i))
    (source / "class0" / "broken.mp4").write_bytes(b"no video")
    begun = time.monotonic()
    assert start(source, tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - begun
    whole = contents(tmp_path / "whole")
    assert sum(name.endswith(".tar") for name in whole) >= 4
    draw = random.Random(0)
    interrupted = 0
    for number in range(KILLS):
        if interrupted >= KILLS:
            break
        out = tmp_path / f"out{number}"
        # What goes on after a kill is killed as well, until it is too quick for that.
        for _ in range(5):
            process = start(source, out)
            time.sleep(draw.uniform(0.1, 0.5) * seconds)
            if process.poll() is None:
                interrupted += 1
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert start(source, out).wait() == 0
        assert verify(out) == []
        assert contents(out) == whole, number
    assert interrupted >= KILLS
    record(
        f"kill -9 of `rev2net prepare` and its workers at random moments, {interrupted} times, {CLIPS} clips",
        "each time the same command completes, `verify` passes and every file has the bytes of the undisturbed run",
        "the clips under way",
    )
