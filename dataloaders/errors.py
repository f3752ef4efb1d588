"""The errors that the rest of the system reacts to by type, and what the commands say about the others."""

from __future__ import annotations

import errno
import os
import sys


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with what was given, what is allowed, and what to do.

    The command lines print it on stderr without a traceback and exit with status 2.
    """


class DecodeError(RuntimeError):
    """A video that cannot be decoded.

    Attributes:
        key: the sample's key (or the file's path, before it is in a shard).
        reason: the decoder's own message.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


class ReadError(DecodeError):
    """A sample that the disk or the network did not give: nothing is known of the video itself."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, of at most 200 characters; its type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def stop_printing() -> None:
    """After a BrokenPipeError (`... | head`): nobody reads on, and else Python complains of it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_failure(error: Exception) -> str:
    """The message of an error that is no mistake of the user's, with advice where there is some."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return f"{error}; free some space and run the same command again: what is finished is kept" if full else str(error)
