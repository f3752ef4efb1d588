"""The two errors that the rest of the system reacts to by type."""

from __future__ import annotations


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
