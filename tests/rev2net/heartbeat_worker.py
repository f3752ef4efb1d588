"""One rank of a loop in which rank 1 gets stuck. Arguments: folder, rank, seconds, how ("sleep", "thread", "stop")."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from rev2net.distributed import Ranks
from rev2net.heartbeat import Heartbeat


def stuck_here() -> None:
    """The frame that is to be found in the report."""
    time.sleep(1000)


def main() -> None:
    """Five things to do, of which rank 1 does not come to an end with the fourth; rank 0 waits in the fifth."""
    folder, rank, limit, how = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    with Heartbeat(ranks, folder, limit, on_hang=lambda message: print(f"told: {len(message)}")) as heart:
        heart.first_step_done()
        for step in range(5):
            heart.beat(f"does step {step}")
            for _ in range(3 + rank):  # moves are no places: they may differ
                heart.move()
                time.sleep(0.05)
            if rank == 1 and step == 3:
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if how == "thread":
                    worker = threading.Thread(target=stuck_here, name="lane-0", daemon=True)
                    worker.start()
                    worker.join()
                stuck_here()
        if how == "none":
            time.sleep(limit / 2)
        else:
            time.sleep(1000)


if __name__ == "__main__":
    main()
