"""The process group: what a rank does whose partners do not come."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch
from tiny import ROOT, environment, run_until_first_ends

from dataloaders.errors import UserError
from rev2net.distributed import read_ranks

WORKER = """
import sys, time
from rev2net.distributed import join, limit_collectives, read_ranks
ranks = read_ranks()
join(ranks, 1)
limit_collectives(3.0)
ranks.barrier()
print("joined", flush=True)
if ranks.rank == 1:
    time.sleep(1000)
try:
    ranks.any(True)
except RuntimeError as error:
    sys.exit("gave up: " + str(error).splitlines()[0])
"""

ALONE = """
import os
from rev2net.distributed import join, read_ranks
before = set(os.listdir("/dev/shm"))
join(read_ranks(), 1)
print("joined, left", {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("deepspeed")})
"""


def test_a_rank_has_a_gpu_of_its_own_unless_it_is_to_leave_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs are made up; nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_ranks().device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"^rank 2 of this machine .* sees 2: start at most 2 here"):
        read_ranks()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert read_ranks().device == torch.device("cpu")


def test_a_process_alone_meets_nobody_where_its_shell_says() -> None:
    """And DeepSpeed, as its launcher calls us, compiles nothing (no compiler is found) and keeps no shared memory."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": str(taken.getsockname()[1])}  # an address of no machine
        env = environment() | place | {"PYTHONPATH": str(ROOT), "LOCAL_SIZE": "1", "PATH": "/nowhere"}
        done = subprocess.run((sys.executable, "-c", ALONE), env=env, capture_output=True, text=True, timeout=120)
    assert "joined, left set()" in done.stdout, done.stderr


def test_ranks_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of a training in this process
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")  # of srun
    with pytest.raises(UserError, match=r"^8 tasks were started that know nothing of each other: start the ranks with"):
        read_ranks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert read_ranks().first
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^WORLD_SIZE=2 is set, but RANK is not: start the ranks with deepspeed"):
        read_ranks()


def test_after_the_first_step_a_collective_without_partners_ends() -> None:
    """Thirty minutes are allowed before that, so it ends for this limit or not at all."""
    status, said, _ = run_until_first_ends(sys.executable, "-c", WORKER)
    assert "joined" in said and status == 1 and "gave up: " in said, said
