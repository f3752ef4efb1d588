"""Cores, and pools of worker processes that do not outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait


def cores() -> set[int]:
    """The cores that this process may use: Slurm and containers bind it to some."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of fresh processes (spawn: the caller may hold threads of torch or FFmpeg, which do not survive a fork).

    Where the caller is killed its workers end too. They would not by themselves: each of them holds the write end of
    the queue that it reads, so the queue never ends.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    # Slurm announces the end of a job with it to every process; the parent is the one that knows what to do.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
