"""The rank that does not go on is named; real processes, of which one is stuck."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny import ROOT, TINY, environment, run, run_until_first_ends, wait

from rev2net import heartbeat
from rev2net.distributed import Ranks
from rev2net.heartbeat import Heartbeat, process_state

WORKER = Path(__file__).with_name("heartbeat_worker.py")


def run_two(folder: Path, how: str) -> tuple[int, str, int]:
    """Rank 0's status and words, and rank 1's process."""
    return run_until_first_ends(sys.executable, str(WORKER), str(folder), "8", how)


def test_p10_a_rank_that_is_stuck_is_named_with_its_stacks(tmp_path: Path) -> None:
    status, said, pid = run_two(tmp_path, "thread")
    assert status == 1
    assert "no rank has made progress for 8 s" in said
    assert f"rank 1 (process {pid} on " in said and "does step 3, it stands at\nthread MainThread:" in said
    assert "in stuck_here" in said and "rank 0 (" not in said and "told: " in said
    assert "thread lane-0:" in said


def test_p10_a_stopped_process_is_named_with_its_state(tmp_path: Path) -> None:
    status, said, pid = run_two(tmp_path, "stop")
    assert status == 1
    assert f"rank 1 (process {pid} on " in said and "does not run: its state is T (stopped)" in said


def test_p10_a_full_disk_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "write_atomically", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    exits = Mock()
    monkeypatch.setattr(os, "_exit", exits)
    told: list[str] = []
    alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with Heartbeat(alone, tmp_path, 3, on_hang=told.append) as heart:
        heart.first_step_done()
        for _ in range(80):
            heart.beat("trains")
            time.sleep(0.05)
        assert not told
        wait("the watch to see that nothing goes on", lambda: told, seconds=20)
    assert exits.called and "rank 0 (" in told[0] and "trains, it stands at\nthread MainThread" in told[0]


SUSPENDED = """
import sys, time
from pathlib import Path
import torch
from rev2net.distributed import Ranks
from rev2net.heartbeat import Heartbeat
alone = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
with Heartbeat(alone, Path(sys.argv[1]), 6, on_hang=print) as heart:
    heart.first_step_done()
    heart.beat("computes")
    time.sleep(1)
    print("ready", flush=True)
    for _ in range(10):
        time.sleep(0.1)
"""


def test_p10_a_job_that_was_suspended_does_not_hang(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(10)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


STUCK = """
import sys, time
from rev2net.config import load_config
from rev2net.train import train
calls = iter(range(1000))
train(load_config("configs/demo.yaml", sys.argv[1:]), stop_requested=lambda: next(calls) == 2 and time.sleep(1000))
"""


def test_p10_a_training_that_gets_stuck_is_ended(tiny_data: Path, tmp_path: Path) -> None:
    words = [*TINY, f"data.path={tiny_data}", f"output={tmp_path}/run", "train.hang_minutes=0.25", "model.name=i3d"]
    words += ["loss.ddp=none", "loss.ddp_low_from=0", "tracking.enabled=false"]
    run(sys.executable, "-c", STUCK, *words, expect=1)
    said = (tmp_path / "run" / "train.log").read_text()
    assert "no rank has made progress for 15 s" in said and "in <lambda>" in said


def test_a_silent_process_of_another_machine_and_one_that_is_gone() -> None:
    assert "look at that machine" in process_state("elsewhere", 1)
    process = subprocess.Popen(["true"])
    process.wait()
    assert process_state(socket.gethostname(), process.pid) == "is gone"
