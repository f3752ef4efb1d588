"""The process group: what a rank does whose partners do not come."""

from __future__ import annotations

import subprocess
import sys

from tiny import ROOT, environment, free_port

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


def test_after_the_first_step_a_collective_without_partners_ends() -> None:
    """Thirty minutes are allowed before that, so it ends for this limit or not at all."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=ROOT,
            env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    try:
        out, error = first.communicate(timeout=120)
    finally:
        second.kill()
        second.communicate()
    assert "joined" in out and first.returncode == 1 and "gave up: " in error, error
