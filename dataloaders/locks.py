"""Locks between processes: of the kernel's, which end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock beside a path; gives False where it is another's and `wait` is False.

    Raises:
        OSError: ENOSYS, ENOLCK or EOPNOTSUPP on a file system that has no locks; it is named.
    """
    with path.with_suffix(".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} (no lock on its file system)", str(path.parent)) from None
        yield True
