"""Data sets behind a URL: their shards are fetched whole, when they are needed, into a bounded cache on this machine.

Any URL that fsspec understands will do. The cache is a folder that all processes of a machine share, also those that
train on other data sets: `FOLDER/rev2net-shards-UID/FINGERPRINT/train-000000.tar`. A shard there is whole or absent,
under its name only when its hash was the manifest's. A lock file beside it says that somebody fills, opens or removes
it: a lock of the kernel's, which ends with the process that holds it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from dataloaders.errors import UserError
from dataloaders.locks import lock

Result = TypeVar("Result")

log = logging.getLogger(__name__)

CACHE_GB = 100.0
"""How much the cache holds unless told otherwise, in 10^9 bytes."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Seconds between one try to reach a server and the next."""

_READ_BYTES = 2**24
_MOMENT = 0.02
"""Seconds until what stands in the way is looked at again."""
_SOON = 30.0
"""Seconds within which a shard in use is used again: a loader marks those of its next steps at each step."""
_OWN_FOLDER = f"rev2net-shards-{os.getuid()}"
"""What is removed is only ever removed from in here: a user may name a cache folder that holds other things, or that
other users have as well, whose files are not ours to lock and to remove."""


class DamagedShardError(RuntimeError):
    """What the server gives as a shard is not what the manifest says."""


class _UnavailableError(RuntimeError):
    """The server or the network failed, for a reason that may pass."""


def is_url(location: str | Path) -> bool:
    """Is this a URL, and not a path?"""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(location)) is not None


def cache_folder(cache: str | Path | None) -> Path:
    """The folder that `cache` names on this machine, or the one for shards in the user's cache directory.

    Raises:
        UserError: it names a variable that is not set. (A machine's own folders are often known by those only.)
    """
    if cache is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rev2net"
    place = os.path.expandvars(cache)
    if "$" in place:
        raise UserError(f"loader.cache={cache} names a variable that is not set on {socket.gethostname()}: set it")
    return Path(place).expanduser()


def read_url(url: str) -> bytes:
    """A whole file; as persistent as `ShardCache`.

    Raises:
        UserError: the URL's scheme is unknown or needs a package that is not installed, or there is no such file.
        RuntimeError: the server failed every time.
    """
    try:
        fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)
        advice = f"install the package {package}" if package else str(error)
        raise UserError(f"{url} cannot be read without a package that is not installed: {advice}") from error
    except ValueError as error:
        scheme = url.partition("://")[0]
        raise UserError(
            f"{url} has the scheme {scheme!r}, which fsspec does not know; give a folder or a URL such as "
            "s3://bucket/data, gs://bucket/data or http://host/data"
        ) from error
    return _persistently(url, lambda: b"".join(_blocks(url)))


class ShardCache:
    """The local copies of one data set's shards.

    Args:
        url: the data set's.
        folder: of the cache, on a disk of this machine.
        limit: bytes that all shards of all data sets in the folder may take.
        fingerprint: the data set's.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, url: str, *, folder: Path, limit: int, fingerprint: str) -> None:
        self._url = url
        self._root = folder / _OWN_FOLDER
        self._limit = limit
        self._warned = False
        self.folder = self._root / fingerprint[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the shard cache {self.folder} cannot be made ({error.strerror}); choose another folder with "
                "loader.cache=FOLDER, or XDG_CACHE_HOME=FOLDER in the environment"
            ) from error

    @contextmanager
    def hold(self, name: str, *, size: int, sha256: str, patient: bool = True) -> Iterator[Path]:
        """The path of a shard's tar, whole, which nobody removes inside the block.

        It is fetched if it is not there; whoever wants it meanwhile, in any process, waits.

        Args:
            name: file name.
            size: bytes.
            patient: try again where the server fails.

        Raises:
            UserError: the server has no such file, or the cache's limit is smaller than the shard.
            DamagedShardError: the server's file has another content than the manifest says.
            RuntimeError: the server failed every time.
            OSError: the cache's disk failed, or is full.
        """
        path = self.folder / name
        with lock(path):
            if not path.exists():
                self._fill(path, size, sha256, patient)
            os.utime(path)
            yield path

    def _fill(self, path: Path, size: int, sha256: str, patient: bool) -> None:
        url = f"{self._url}/{path.name}"
        part = path.with_name(path.name + ".part")
        try:
            self._reserve(part, size)
            _persistently(url, lambda: _download(url, part, size, sha256), patient)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Make `part` with its full size, so that all fillers see what is taken, after removing what is in the way."""
        if size > self._limit:
            raise UserError(
                f"loader.cache_gb={self._limit / 1e9:g} is less than {part.stem} takes; give at least {size / 1e9:.3g}"
            )
        part.unlink(missing_ok=True)  # of somebody who was killed
        with lock(self._root / "room"):
            while not self._make_room(size):
                time.sleep(_MOMENT)  # the rest is being filled or opened
            with part.open("wb") as file:
                file.truncate(size)

    def _make_room(self, size: int) -> bool:
        """Remove the shards used longest ago until `size` bytes fit in; whether they do."""
        try:
            held = {path: path.stat() for path in self._root.glob("*/*") if path.suffix in (".tar", ".part")}
        except FileNotFoundError:  # another has just finished or given up
            return False
        excess = sum(stat.st_size for stat in held.values()) + size - self._limit
        for path in sorted(held, key=lambda path: held[path].st_mtime_ns):
            if excess <= 0:
                break
            with lock(path.with_suffix("") if path.suffix == ".part" else path, wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".idx").unlink(missing_ok=True)
                    excess -= held[path].st_size
                    self._warn(path.name, time.time() - held[path].st_mtime)
        return excess <= 0

    def _warn(self, name: str, idle: float) -> None:
        """Say once that what is removed is needed again soon."""
        if idle < _SOON and not self._warned:
            self._warned = True
            log.warning(
                "shard %s is removed from the cache %.0f s after its last use: what is read at one time does not fit "
                "into loader.cache_gb=%g and is fetched again and again; raise it",
                name,
                idle,
                self._limit / 1e9,
            )


def _persistently(url: str, work: Callable[[], Result], patient: bool = True) -> Result:
    """The result of `work`, tried again while the server is in trouble; a damaged file is fetched twice."""
    tries = len(WAITS) + 1 if patient else 1
    for attempt in range(1, tries + 1):
        try:
            return work()
        except (_UnavailableError, DamagedShardError) as error:
            if isinstance(error, DamagedShardError) and attempt >= 2:
                raise
            if attempt == tries:
                raise RuntimeError(
                    f"{url} cannot be fetched, tried {tries} times: {error}; "
                    "look at the server and the network and run the same command again"
                ) from error
            wait = WAITS[attempt - 1]
            log.warning("%s cannot be fetched: %s; trying again in %g s", url, error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _download(url: str, part: Path, size: int, sha256: str) -> None:
    digest = hashlib.sha256()
    got = 0
    try:
        # Not opened anew: its size is what other processes count with.
        with part.open("r+b") as file:
            for block in _blocks(url):
                got += len(block)
                if got > size:
                    break
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = "; lower loader.cache_gb or choose another loader.cache" if error.errno == errno.ENOSPC else ""
        raise OSError(error.errno, f"{error.strerror}{advice}", str(part)) from error
    if got != size:
        raise DamagedShardError(f"{url} has {'more' if got > size else got} bytes, dataset.json says {size}")
    if digest.hexdigest() != sha256:
        raise DamagedShardError(f"{url} has not the content that dataset.json says (sha256 differs)")


def _blocks(url: str) -> Iterator[bytes]:
    """A file's content.

    Raises:
        UserError: there is no such file.
        _UnavailableError: anything else.
    """
    opened, client = _options(url)
    try:
        # Anew each time: fsspec keeps one file system per thread, and not all of them may be used by several.
        system, path = fsspec.core.url_to_fs(url, **client)
        # Without blocks of its own HTTP is one stream, also from servers that know no ranges; an object store is
        # asked for what is read.
        with system.open(path, "rb", block_size=0, **opened) as source:
            while block := source.read(_READ_BYTES):
                yield block
    except FileNotFoundError as error:
        raise UserError(
            f"{url} does not exist; look at the address, or run `rev2net verify` where it was made"
        ) from error
    except PermissionError as error:
        raise UserError(f"{url} is refused ({error}); look at the address and your rights") from error
    except Exception as error:
        status = getattr(error, "status", None)  # of HTTP
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
            raise UserError(f"{url} is refused by the server ({error}); look at the address and your rights") from error
        raise _UnavailableError(f"{type(error).__name__}: {error}") from error


def _options(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What opening a file and connecting to its server take besides."""
    if not url.startswith(("http://", "https://")):
        return {}, {}
    import aiohttp

    # Any size spares the question for it, in which fsspec takes a server that is away for a file that is not there.
    # aiohttp would give up after five minutes, however well a large shard comes along.
    return {"size": 1}, {
        "client_kwargs": {
            "trust_env": True,
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
        }
    }
