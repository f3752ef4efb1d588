"""Data sets on disk: tar shards with their DALI index, and the manifest `dataset.json`.

A shard is a plain WebDataset tar: sample `key` is `key.flow.mp4` (optional), `key.json`, `key.mp4`, in the
alphabetical order in which webdataset writes them. The DALI index (`.idx`, v1.2) beside the tar is the only
index; a reader finds every sample through it and never scans the tar.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import platform
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from webdataset.writer import TarWriter

from dataloaders.errors import DecodeError, ReadError, UserError
from dataloaders.remote import CACHE_GB, ShardCache, cache_folder, is_url, read_url

FORMAT = 1
MANIFEST = "dataset.json"
RGB_EXTENSION = "mp4"
FLOW_EXTENSION = "flow.mp4"
INFO_EXTENSION = "json"
HELD_OUT = "held-out"
"""Name of the split that `DataSet.hold_out` makes."""
_INDEX_VERSION = "v1.2"
_INDEX_ENTRY = rb"[!-~]+ \d{1,18} \d{1,18} [!-~]+\.[!-~]+"
_INDEX_LINE = re.compile(rb"%b(?: %b)*" % (_INDEX_ENTRY, _INDEX_ENTRY))
_TAR_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInfo:
    """What `key.json` says about a sample; sizes in pixels of the stored videos.

    Attributes:
        source: the source file's path, relative to the source's root.
        num_frames: of the RGB video and of the flow video alike.
        flow_height: height of one flow plane (the flow video is twice as tall); None without flow.
        flow_width: width of the flow video; None without flow.
        source_bytes: size of the source file; None in a data set that was prepared before this was kept.
        sha256: of the sample's videos, by extension; empty where nobody knows.
    """

    key: str
    label: int
    class_name: str
    source: str
    num_frames: int
    fps: float
    height: int
    width: int
    flow_height: int | None = None
    flow_width: int | None = None
    source_bytes: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_json(cls, key: str, data: bytes) -> SampleInfo:
        """Read `key.json`; raises DecodeError when it is damaged."""
        try:
            raw = json.loads(data)
            return cls(
                key=key,
                label=raw["label"],
                class_name=raw["class"],
                source=raw["source"],
                num_frames=raw["num_frames"],
                fps=raw["fps"],
                height=raw["height"],
                width=raw["width"],
                flow_height=raw["flow_height"],
                flow_width=raw["flow_width"],
                source_bytes=raw.get("source_bytes"),
                sha256=dict(raw.get("sha256", {})),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DecodeError(key, f"damaged {INFO_EXTENSION}: {error!r}") from error

    def to_json(self) -> bytes:
        """The bytes of `key.json`."""
        raw = asdict(self)
        del raw["key"]
        raw["class"] = raw.pop("class_name")
        return json.dumps(raw, sort_keys=True).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard of a split.

    Attributes:
        path: of its tar; of a remote data set's shard, in the cache, where it need not be at the moment.
        samples: how many of the split it holds.
        bytes, sha256: of the tar.
        cache: of a remote data set, else None.
        first: where the split's samples begin in it: not at 0 where the ones before are another split's.
    """

    path: Path
    samples: int
    bytes: int
    sha256: str
    cache: ShardCache | None = None
    first: int = 0

    def open(self) -> ShardReader:
        """A reader, for which a remote shard is fetched first; errors of `ShardReader` and `ShardCache.hold`."""
        if self.cache is None:
            return ShardReader(self.path)
        with self.cache.hold(self.path.name, size=self.bytes, sha256=self.sha256) as path:
            _index(path)
            return ShardReader(path)

    def fetch(self) -> None:
        """Have a remote shard here, and make it the last to be removed; errors of `ShardCache.hold`, after one try."""
        if self.cache is not None:
            with self.cache.hold(self.path.name, size=self.bytes, sha256=self.sha256, patient=False) as path:
                _index(path)


def _index(path: Path) -> None:
    """Make the index of a fetched tar, unless it is there.

    The tar's hash was checked, the server's own index has none.
    """
    if index_path(path).exists():
        return
    samples: dict[str, list[str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key = _split_key(member.name)
                column = f"{member.name[len(key) + 1 :]} {member.offset_data} {member.size} {member.name}"
                samples.setdefault(key, []).append(column)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{path.name} is no tar of samples ({error}); prepare the data set again") from error
    write_atomically(index_path(path), _index_text([" ".join(columns) for columns in samples.values()]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    file: str
    samples: int
    bytes: int
    sha256: str


class DataSet:
    """A prepared data set; opening reads the manifest and nothing else.

    Attributes:
        location: the folder or URL.
        remote: whether its shards come over the network.
    """

    def __init__(
        self, location: str, folder: Path, manifest: Mapping[str, Any], fingerprint: str, cache: ShardCache | None
    ) -> None:
        self.location = location
        self.folder = folder
        self.manifest = manifest
        self.remote = cache is not None
        self._fingerprint = fingerprint
        try:
            self._shards = {
                split: tuple(_shard_info(shard, location, folder, cache) for shard in entry["shards"])
                for split, entry in manifest["splits"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{MANIFEST} of {location} is damaged ({error!r}); prepare the data set again") from error

    @classmethod
    def open(cls, location: str | Path, *, cache: str | Path | None = None, cache_gb: float = CACHE_GB) -> DataSet:
        """Open a data set.

        Args:
            location: a folder, or a URL that fsspec understands.
            cache: of a remote data set's shards, a folder on this machine; the user's cache directory by default.
            cache_gb: what that folder may hold, in 10^9 bytes.

        Raises:
            UserError: the data set is missing, has no manifest, or a damaged one or one of an unknown format; no
                package for the URL is installed; the cache cannot be made.
            RuntimeError: the server cannot be reached.
        """
        if not is_url(location):
            folder = Path(location)
            data = _read_manifest(folder)
            manifest = _parse_manifest(data, str(folder / MANIFEST))
            return cls(str(location), folder, manifest, hashlib.sha256(data).hexdigest(), None)
        url = str(location).rstrip("/")
        data = read_url(f"{url}/{MANIFEST}")
        manifest = _parse_manifest(data, f"{url}/{MANIFEST}")
        fingerprint = hashlib.sha256(data).hexdigest()
        kept = ShardCache(url, folder=cache_folder(cache), limit=round(cache_gb * 1e9), fingerprint=fingerprint)
        return cls(url, kept.folder, manifest, fingerprint, kept)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return tuple(self.manifest["classes"])

    @property
    def codec(self) -> str:
        """`h264` or `vp9`; RGB and flow have the same."""
        return str(self.manifest["video"]["codec"])

    @property
    def preparation(self) -> dict[str, Any]:
        """How the videos were prepared: `PrepareSettings.to_json`; UserError where the manifest does not say."""
        try:
            return dict(self.manifest["settings"]["preparation"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{MANIFEST} of {self.location} does not say how the videos were prepared ({error!r}); prepare it again"
            ) from error

    @property
    def official(self) -> Mapping[str, Any] | None:
        """The official `lists` that it was prepared from (ucf101, hmdb51 or kinetics) and their `split`, None for the
        only one. Empty where it is of no official lists; None in a data set that was prepared before this was kept.
        """
        return (self.manifest["official"] or {}) if "official" in self.manifest else None

    @property
    def has_flow(self) -> bool:
        """Whether the samples hold flow videos."""
        return self.manifest["flow"] is not None

    @property
    def flow_scale(self) -> float | None:
        """Nominal size of the flow video relative to the RGB video; None without flow."""
        return float(self.manifest["flow"]["scale"]) if self.has_flow else None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._shards)

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The split's shards in their order on disk; UserError for an unknown split."""
        if split not in self._shards:
            raise UserError(
                f"data set {self.location} has no split {split!r}; it has {', '.join(self.splits) or 'none'} (one for "
                "testing can be drawn from the training clips: prepare --val-fraction, or data.holdout of one training)"
            )
        return self._shards[split]

    def num_samples(self, split: str) -> int:
        """Number of samples of a split; UserError for an unknown split."""
        return sum(shard.samples for shard in self.shards(split))

    def left_out(self, split: str) -> dict[str, int]:
        """How many videos of a split were listed and are not in it: `missing` on the disk, `quarantined` because they
        do not decode. Empty in a data set that was prepared before these were counted.
        """
        entry = self.manifest["splits"][split]
        return {name: int(entry[name]) for name in ("missing", "quarantined") if name in entry}

    def hold_out(self, split: str, share: float) -> DataSet:
        """The same data set with the last samples of a split moved to one of their own, `HELD_OUT`.

        Samples lie in a random order of which every stretch holds each class about as often as the whole does: so the
        last ones are a fair part, the same for every seed and number of ranks. The others keep their numbers.

        Args:
            split: its name.
            share: of its samples, between 0 and 1; at least one is held out.

        Raises:
            UserError: no such split, or no sample would be left in it.
        """
        total = self.num_samples(split)
        left = total - max(1, round(share * total))
        if left < 1:
            raise UserError(
                f"data.holdout={share} of the {total} samples of split {split} of {self.location} leaves none to train "
                "on: lower it, or prepare more clips"
            )
        kept: list[ShardInfo] = []
        held: list[ShardInfo] = []
        for shard in self.shards(split):
            here = min(left, shard.samples)
            left -= here
            if here:
                kept.append(replace(shard, samples=here))
            if here < shard.samples:
                held.append(replace(shard, first=here, samples=shard.samples - here))
        data = copy.copy(self)
        data._shards = {**self._shards, split: tuple(kept), HELD_OUT: tuple(held)}
        return data

    def fingerprint(self) -> str:
        """Hash of the manifest, which holds the hash of every shard."""
        return self._fingerprint


def _read_manifest(folder: Path) -> bytes:
    if not folder.is_dir():
        raise UserError(f"data set folder {folder} does not exist; make it with `rev2net prepare`")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST}, so it is no finished data set; make it with `rev2net prepare`")
    return path.read_bytes()


def _parse_manifest(data: bytes, path: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
        known = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); prepare the data set again") from error
    if not known:
        raise UserError(
            f"{path} has format {manifest['format']!r}, this version reads format {FORMAT}; "
            "prepare the data set again or use the version that wrote it"
        )
    return manifest


def _shard_info(shard: Mapping[str, Any], location: str, folder: Path, cache: ShardCache | None) -> ShardInfo:
    name = shard["file"]
    # It must not lead out of the data set's folder or the cache.
    if re.fullmatch(r"[^/\\\x00]+\.tar", name) is None:
        raise UserError(
            f"{MANIFEST} of {location} names the shard {name!r}, which is no plain file name ending in .tar; "
            "do not use this data set, or prepare it again"
        )
    return ShardInfo(
        path=folder / name, samples=shard["samples"], bytes=shard["bytes"], sha256=shard["sha256"], cache=cache
    )


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `dataset.json` aside and rename it into place."""
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either all of it or nothing under its name."""
    # Machines that share the folder have the same process numbers.
    aside = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with _naming(path):
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file beside `path`, with its suffix, that gets its name when the block ends well, and is deleted otherwise."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """UserError for a file that is to be written under a name of another kind, in no folder, or over one."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file another name")
    if path.suffix not in suffixes:
        raise UserError(f"{path} does not end in {' or '.join(suffixes)}: give the file such a name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it, or write the file elsewhere")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file was to be written: a write's own names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class ShardWriter:
    """Writes one shard and its index; both appear under their names only when complete.

    Use as a context manager; `entry` is there after a normal end. An exception inside the block leaves
    nothing behind. The same samples give the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(path.name + ".tmp")
        self._file = _HashingFile(self._aside, called=path)
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user="rev2net", group="rev2net")
        self._offset = 0
        self._lines: list[str] = []
        self.entry: ShardEntry | None = None

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Append a sample; `parts` maps extensions (no leading dot) to contents."""
        assert "." not in key and " " not in key, key
        self._tar.write({"__key__": key, **parts})
        columns: list[str] = []
        for extension in sorted(parts):
            size = len(parts[extension])
            start = self._offset + _TAR_BLOCK
            columns.append(f"{extension} {start} {size} {key}.{extension}")
            self._offset = start + -(-size // _TAR_BLOCK) * _TAR_BLOCK
        assert self._offset == self._tar.tarstream.offset, "a tar header longer than one block"
        self._lines.append(" ".join(columns))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self.entry is None:
                self._discard()

    def _discard(self) -> None:
        # A full disk fails here again, and the first error is the one to tell.
        for stream in (self._tar, self._file):
            with contextlib.suppress(OSError):
                stream.close()
        self._aside.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._tar.close()
        self._file.close()
        write_atomically(index_path(self._path), _index_text(self._lines))
        self._aside.replace(self._path)
        self.entry = ShardEntry(
            file=self._path.name,
            samples=len(self._lines),
            bytes=self._file.size,
            sha256=self._file.hash.hexdigest(),
        )


class ShardReader:
    """Random access to one shard by its index; safe to share between threads.

    Holds one line of the index per sample, about 150 bytes.

    Raises:
        UserError: the shard or its index is missing, or the index is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = index_path(self.path)
        for file in (self.path, index):
            if not file.is_file():
                raise UserError(f"shard file {file} is missing; run `rev2net verify {self.path.parent}`")
        lines = index.read_bytes().splitlines()
        whole = bool(lines) and lines[0] == f"{_INDEX_VERSION} {len(lines) - 1}".encode()
        if not whole or not all(map(_INDEX_LINE.fullmatch, lines[1:])):
            raise UserError(f"index {index} is damaged; run `rev2net verify {self.path.parent}`")
        self._lines = lines[1:]
        self._descriptor = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        """The key of the sample at `index`."""
        return _split_key(self._lines[index].decode().split(" ")[3])

    def read(
        self,
        index: int,
        extensions: Sequence[str] = (RGB_EXTENSION, FLOW_EXTENSION, INFO_EXTENSION),
    ) -> dict[str, bytes]:
        """The sample's parts by extension; an extension that the sample lacks is left out.

        Raises:
            DecodeError: the tar ends before the sample does.
            ReadError: the disk cannot read it.
        """
        parts: dict[str, bytes] = {}
        for extension, offset, size, name in _components(self._lines[index]):
            if extension not in extensions:
                continue
            try:
                data = os.pread(self._descriptor, size, offset)
            except OSError as error:
                raise ReadError(_split_key(name), f"{self.path.name}: {error}") from error
            if len(data) != size:
                raise DecodeError(_split_key(name), f"{self.path.name} ends inside {name}")
            parts[extension] = data
        return parts

    @property
    def removed(self) -> bool:
        """Whether the tar has no name any more; it can still be read, and takes its space until it is closed."""
        return os.fstat(self._descriptor).st_nlink == 0

    def components(self) -> list[tuple[str, int, int]]:
        """Name, offset and size of every file the index lists, in order."""
        return [(name, offset, size) for line in self._lines for _, offset, size, name in _components(line)]

    def close(self) -> None:
        """Close the tar; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_suffix(".idx")


def _index_text(lines: Sequence[str]) -> bytes:
    return (f"{_INDEX_VERSION} {len(lines)}\n" + "".join(f"{line}\n" for line in lines)).encode()


def hashes_of(parts: Mapping[str, bytes]) -> dict[str, str]:
    """`SampleInfo.sha256` of videos, by extension."""
    return {extension: hashlib.sha256(data).hexdigest() for extension, data in parts.items()}


def file_sha256(path: Path) -> str:
    """Hash of a file's content, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def _components(line: bytes) -> list[tuple[str, int, int, str]]:
    words = line.decode().split(" ")
    return [(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)]


def _split_key(name: str) -> str:
    return name[: name.index(".", name.rfind("/") + 1)]


class _HashingFile(io.RawIOBase):
    """A new file that hashes and counts what is written to it; its errors name the file `called`."""

    def __init__(self, path: Path, *, called: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._called = called
        self.hash = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
        with _naming(self._called):
            return self._file.write(data)

    def close(self) -> None:
        if not self._file.closed:
            with _naming(self._called):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
        super().close()
