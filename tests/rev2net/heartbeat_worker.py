"""One rank of a loop in which rank 1 gets stuck. Arguments: folder, seconds, how ("thread", "stop")."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from rev2net.distributed import read_ranks
from rev2net.heartbeat import Heartbeat


def stuck_here() -> None:
    """The frame that is to be found in the report."""
    time.sleep(1000)


def main() -> None:
    """Five things to do, of which rank 1 does not come to an end with the fourth; rank 0 waits in the fifth."""
    folder, limit, how = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    ranks = read_ranks()
    with Heartbeat(ranks, folder, limit, on_hang=lambda message: print(f"told: {len(message)}")) as heart:
        (folder / f"begun-{ranks.rank}").touch()
        while len(list(folder.glob("begun-*"))) < 2:  # one whose imports take long would look as if it were stuck
            time.sleep(0.05)
        heart.first_step_done()
        for step in range(5):
            heart.beat(f"does step {step}")
            for _ in range(3 + ranks.rank):  # moves are no places: they may differ
                heart.move()
                time.sleep(0.05)
            if ranks.rank == 1 and step == 3:
                if how == "stop":
                    while not (folder / "rank-00001.json").exists():  # its first sign of life takes an interval
                        time.sleep(0.05)
                    os.kill(os.getpid(), signal.SIGSTOP)
                worker = threading.Thread(target=stuck_here, name="lane-0", daemon=True)
                worker.start()
                worker.join()
        time.sleep(1000)


if __name__ == "__main__":
    main()
