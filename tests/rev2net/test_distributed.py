"""The process group: what a rank does whose partners do not come."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import run_until_first_ends

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


def test_after_the_first_step_a_collective_without_partners_ends() -> None:
    """Thirty minutes are allowed before that, so it ends for this limit or not at all."""
    status, said, _ = run_until_first_ends(sys.executable, "-c", WORKER)
    assert "joined" in said and status == 1 and "gave up: " in said, said
