"""The process group: what a rank does whose partners do not come."""

from __future__ import annotations

import sys

from tiny import run_until_first_ends

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
    status, said, _ = run_until_first_ends(sys.executable, "-c", WORKER)
    assert "joined" in said and status == 1 and "gave up: " in said, said
