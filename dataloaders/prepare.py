"""Source videos become a data set: transcoded by processes, put in random order, cut into shards.

Everything that is not finished lies in `OUT/.work`: one set of files per clip, then the plan of the shards, then one
record per packed shard. A run that was interrupted, however it ended, finds there what it need not do again.
`dataset.json` is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import platform
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from dataloaders.errors import DecodeError, UserError
from dataloaders.flow import BOUND
from dataloaders.locks import lock
from dataloaders.progress import Progress
from dataloaders.reuse import take_over
from dataloaders.shards import (
    FLOW_EXTENSION,
    FORMAT,
    INFO_EXTENSION,
    MANIFEST,
    RGB_EXTENSION,
    DataSet,
    SampleInfo,
    ShardWriter,
    shard_name,
    write_atomically,
    write_manifest,
)
from dataloaders.sources import SourceClip, SourceListing, shuffled
from dataloaders.transcode import PrepareSettings, changed_settings, transcode
from dataloaders.video import KEYFRAME_INTERVAL, MINIMUM
from dataloaders.workers import worker_pool

WORK = ".work"
PLAN = "plan.json"
QUARANTINE = "quarantine.jsonl"
MISSING = "missing.txt"

_SYSTEM_ERRORS = 1000
"""Numbers of the system's errors lie below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadClip:
    """A source file that could not be prepared."""

    file: str
    split: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """How a preparation ended.

    Attributes:
        prepared: clips of each split that are in the data set.
        quarantined: clips that are not, with reasons; also in `OUT/quarantine.jsonl`.
        finished: False when more clips were bad than allowed; then there is no data set.
        already: True when the folder held this very data set before.
    """

    prepared: Mapping[str, int]
    quarantined: tuple[BadClip, ...]
    finished: bool
    already: bool = False


def prepare(
    listing: SourceListing,
    out: Path,
    settings: PrepareSettings,
    *,
    workers: int = 1,
    max_bad: float = 0.01,
    max_missing: float = 0.1,
    reuse: Sequence[DataSet] = (),
) -> PrepareReport:
    """Make the data set `out`, or go on making it; where it is made already, do nothing.

    Args:
        workers: processes; with 1 the work is done in this one.
        max_bad: share of the clips that may be bad. One bad clip is always allowed, except with 0.
        max_missing: share of the listed clips that the disk may lack; they are named in `OUT/missing.txt`.
        reuse: data sets of `open_donors`, whose samples need not be made again.

    Raises:
        UserError: the settings cannot be stored, `out` holds something else or is being made by another process, too
            many clips or all of a split are missing, or no clip of a split is good.
        OSError: a source file is gone or cannot be reached any more; what is done is kept.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"the allowed share of bad clips is {max_bad}; give a number from 0 to 1")
    identity = _identity(listing, settings, workers, max_missing)
    if _claim(out, identity):
        report = _finished_report(out)
    else:
        with _alone(out):
            report = _prepare(listing, out, settings, identity, workers=workers, max_bad=max_bad, reuse=reuse)
    if report.finished:
        shutil.rmtree(out / WORK, ignore_errors=True)  # also of a share that came late, and of an end before this line
    return report


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes out, where the file system has locks (Lustre mounted without `flock` has none)."""
    (out / WORK).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            ours = stack.enter_context(lock(out / WORK / "prepare", wait=False))
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            ours = True
        if not ours:
            raise UserError(
                f"another process prepares into {out}: wait until it is done, or, if there is none, delete "
                f"{out / WORK / 'prepare.lock'}"
            )
        yield


def _prepare(
    listing: SourceListing,
    out: Path,
    settings: PrepareSettings,
    identity: Mapping[str, Any],
    *,
    workers: int,
    max_bad: float,
    reuse: Sequence[DataSet],
) -> PrepareReport:
    """`prepare` of a folder that is this process's alone."""
    if _claim(out, identity):  # another process has just made it
        return _finished_report(out)
    work = out / WORK
    plan_file = work / PLAN
    if not plan_file.is_file():
        bad = _transcode_all(listing.clips, work, settings, workers, reuse)
        _refuse_empty_splits(listing, bad, out)
        _write_lines(out / QUARANTINE, [json.dumps(asdict(entry)) for entry in bad])
        _write_lines(out / MISSING, [clip.relative for clip in listing.missing])
        if len(bad) > _allowed(max_bad, len(listing.clips)):
            return PrepareReport(prepared={}, quarantined=bad, finished=False)
        names = {clip.relative for clip in listing.clips} - {entry.file for entry in bad}
        good = [clip for clip in listing.clips if clip.relative in names]
        write_atomically(plan_file, json.dumps(_plan(good, listing.splits, work, settings)).encode())
    plan: dict[str, list[list[str]]] = json.loads(plan_file.read_bytes())
    records = _pack(plan, out)
    quarantined = read_quarantine(out)
    write_manifest(out, _manifest(listing, settings, identity, records, quarantined))
    for stray in out.glob("*.tmp"):
        stray.unlink()
    return PrepareReport(
        prepared={split: sum(map(len, shards)) for split, shards in plan.items()},
        quarantined=quarantined,
        finished=True,
    )


def prepare_share(
    listing: SourceListing,
    out: Path,
    settings: PrepareSettings,
    share: tuple[int, int],
    *,
    workers: int = 1,
    max_missing: float = 0.1,
    reuse: Sequence[DataSet] = (),
) -> tuple[int, tuple[BadClip, ...]]:
    """Do one machine's part of the work and leave it in `out`, for a `prepare` that finds all parts done.

    Any number of shares may run at once on machines that see the same folder, be killed, and run again.

    Args:
        share: (i, n): the i-th of n parts, i from 1. Every n-th clip, so that each part has all classes.

    Returns:
        The number of clips of this share, and those of them that are bad.

    Raises:
        UserError: as `prepare`, or a share that is not from 1 to n.
    """
    number, shares = share
    if not 1 <= number <= shares:
        raise UserError(f"--share is {number}/{shares}; give I/N with I from 1 to N")
    clips = listing.clips[number - 1 :: shares]
    if _claim(out, _identity(listing, settings, workers, max_missing)) or (out / WORK / PLAN).is_file():
        return len(clips), ()
    return len(clips), _transcode_all(clips, out / WORK, settings, workers, reuse)


def read_quarantine(out: Path) -> tuple[BadClip, ...]:
    """The bad clips of a preparation; none when it had none."""
    file = out / QUARANTINE
    if not file.is_file():
        return ()
    return tuple(BadClip(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines())


def _identity(listing: SourceListing, settings: PrepareSettings, workers: int, max_missing: float) -> Mapping[str, Any]:
    """What a data set is known by; refuses what cannot be prepared."""
    settings.check()
    _check_keys(listing)
    if workers < 1:
        raise UserError(f"workers is {workers}; give 1 or more")
    _check_missing(listing, max_missing)
    return {"preparation": settings.to_json(), "source": listing.fingerprint()}


def _claim(out: Path, identity: Mapping[str, Any]) -> bool:
    """Make or take over the folder; True when it holds this very data set."""
    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file; give a new or empty folder")
    work_settings = out / WORK / "settings.json"
    for file in (out / MANIFEST, work_settings):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_bytes())
            found = found["settings"] if file.name == MANIFEST else found
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{file} is damaged, or of something else; give another folder, or delete that one first"
            ) from None
        if found == identity:
            return file.name == MANIFEST
        raise UserError(
            f"output folder {out} holds a data set made from {_difference(found, identity)}; "
            "give another folder, or delete that one first"
        )
    if out.is_dir() and any(entry.name != WORK for entry in out.iterdir()):
        raise UserError(f"output folder {out} holds something that is no data set; give a new or empty folder")
    work_settings.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(work_settings, json.dumps(identity).encode())
    return False


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    try:
        both = changed_settings(found["preparation"], wanted["preparation"])
        changed = [f"{name} {there} (now {here})" for name, (there, here) in both.items()]
    except (TypeError, KeyError):
        changed = []
    return f"other settings: {', '.join(changed)}" if changed else "another list of clips"


def _finished_report(out: Path) -> PrepareReport:
    splits = json.loads((out / MANIFEST).read_bytes())["splits"]
    return PrepareReport(
        prepared={split: entry["samples"] for split, entry in splits.items()},
        quarantined=read_quarantine(out),
        finished=True,
        already=True,
    )


def _allowed(max_bad: float, clips: int) -> int:
    return max(1, int(max_bad * clips)) if max_bad > 0 else 0


def _check_keys(listing: SourceListing) -> None:
    keys: dict[str, SourceClip] = {}
    for clip in listing.clips:
        if (other := keys.setdefault(clip.key, clip)) is not clip:
            raise UserError(f"{other.relative} and {clip.relative} get the same key {clip.key}: rename one of them")


def _check_missing(listing: SourceListing, max_missing: float) -> None:
    if not 0 <= max_missing <= 1:
        raise UserError(f"the allowed share of missing clips is {max_missing}; give a number from 0 to 1")
    absent, listed = len(listing.missing), len(listing.clips) + len(listing.missing)
    if absent > max_missing * listed:
        raise UserError(
            f"{absent} of {listed} listed clips are not on the disk, the first is {listing.missing[0].relative}; "
            f"that is more than --max-missing {max_missing:g} allows: find them, or allow more "
            "(missing.txt in the data set names them all then)"
        )
    empty = sorted({clip.split for clip in listing.missing} - set(listing.splits))
    if empty:
        first = next(clip.relative for clip in listing.missing if clip.split == empty[0])
        raise UserError(
            f"no listed clip of the split {empty[0]} is on the disk, the first would be {first}: find them, or give "
            "lists without that split"
        )


def _refuse_empty_splits(listing: SourceListing, bad: Sequence[BadClip], out: Path) -> None:
    counts = Counter(clip.split for clip in listing.clips)
    counts.subtract(entry.split for entry in bad)
    empty = [split for split in listing.splits if counts[split] == 0]
    if not empty:
        return
    first = next(entry for entry in bad if entry.split == empty[0])
    if not counts.total():  # nothing is worth keeping
        shutil.rmtree(out / WORK, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()
    raise UserError(
        f"no clip of the split {empty[0]} can be decoded, the first is {first.file} ({first.reason}); "
        "give videos that FFmpeg can read"
    )


def _write_lines(file: Path, lines: Sequence[str]) -> None:
    """No file where there is no line, also none from an earlier attempt."""
    if lines:
        write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
    else:
        file.unlink(missing_ok=True)


def _sample_file(work: Path, key: str, extension: str) -> Path:
    return work / "samples" / key[-2:] / f"{key}.{extension}"


def _is_done(work: Path, key: str) -> bool:
    # The description is written last.
    return _sample_file(work, key, INFO_EXTENSION).is_file()


def _transcode_to_files(work: Path, settings: PrepareSettings, clip: SourceClip) -> BadClip | None:
    """Runs in the worker processes; leaves the sample's parts in the work folder."""
    try:
        parts = _transcode(clip, settings)
    except DecodeError as error:
        return BadClip(file=clip.relative, split=clip.split, reason=error.reason)
    _write_sample(work, clip.key, parts)
    return None


def _transcode(clip: SourceClip, settings: PrepareSettings, *, again: bool = True) -> Mapping[str, bytes]:
    """`transcode`, and `again` where the disk may be to blame, which says nothing about its videos.

    Raises:
        DecodeError: the video is bad.
        OSError: the disk does not give it.
    """
    try:
        return transcode(clip, settings)
    except DecodeError as error:
        if not clip.path.exists():
            raise FileNotFoundError(
                errno.ENOENT, "was there when the clips were listed, and is not now", str(clip.path)
            ) from error
        if not again or not _is_system_error(error.__cause__):
            raise
    _read_whole(clip.path)
    return _transcode(clip, settings, again=False)


def _is_system_error(cause: BaseException | None) -> bool:
    """Whether FFmpeg failed with the system's error (EIO, ESTALE, EMFILE, ...), not with one of its own, whose numbers
    are large. Its readers of some formats say EIO of damaged videos too.
    """
    return isinstance(cause, OSError) and 0 < (cause.errno or 0) < _SYSTEM_ERRORS


def _read_whole(path: Path) -> None:
    """OSError where the disk does not give the file."""
    with path.open("rb") as file:
        while file.read(2**24):
            pass


def _write_sample(work: Path, key: str, parts: Mapping[str, bytes]) -> None:
    for extension in (RGB_EXTENSION, FLOW_EXTENSION, INFO_EXTENSION):
        if extension in parts:
            file = _sample_file(work, key, extension)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, parts[extension])


def _transcode_all(
    clips: Sequence[SourceClip], work: Path, settings: PrepareSettings, workers: int, reuse: Sequence[DataSet]
) -> tuple[BadClip, ...]:
    todo = [clip for clip in clips if not _is_done(work, clip.key)]
    _say_scaling(settings)
    if len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} clips are done already", file=sys.stderr)
    if reuse:
        todo = _take_over_all(todo, work, reuse)
    job = partial(_transcode_to_files, work, settings)
    bad: list[BadClip] = []
    with Progress(len(todo), "clip") as progress:
        results = map(job, todo) if workers == 1 else _in_processes(job, todo, workers)
        for result in results:
            if result is not None:
                bad.append(result)
            progress.step()
    return tuple(sorted(bad, key=lambda entry: entry.file))


def _take_over_all(clips: Sequence[SourceClip], work: Path, reuse: Sequence[DataSet]) -> list[SourceClip]:
    """Returns the clips that no data set of `reuse` holds."""
    names = ", ".join(donor.location for donor in reuse)
    print(f"looking for {len(clips)} clips in {names}", file=sys.stderr)
    for clip, parts in take_over(clips, reuse):
        _write_sample(work, clip.key, parts)
    left = [clip for clip in clips if not _is_done(work, clip.key)]
    print(f"{len(clips) - len(left)} clips are taken over, {len(left)} are not there", file=sys.stderr)
    return left


def _in_processes(job: partial[BadClip | None], clips: Sequence[SourceClip], workers: int) -> Iterator[BadClip | None]:
    waiting = deque(clips)
    while waiting:
        running: dict[Future[BadClip | None], SourceClip] = {}
        try:
            yield from _in_one_pool(job, waiting, running, workers)
        except BrokenProcessPool:
            print(f"a worker process died: its clips are tried again, one by one ({len(running)})", file=sys.stderr)
            yield from _one_by_one(job, list(running.values()))


def _in_one_pool(
    job: partial[BadClip | None],
    waiting: deque[SourceClip],
    running: dict[Future[BadClip | None], SourceClip],
    workers: int,
) -> Iterator[BadClip | None]:
    with worker_pool(workers) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    future = pool.submit(job, waiting[0])
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    del running[future]
                    yield result
        finally:
            for future in running:
                future.cancel()


def _one_by_one(job: partial[BadClip | None], clips: Sequence[SourceClip]) -> Iterator[BadClip | None]:
    """Of clips one of which has killed a process: a clip that does so alone is a bad one."""
    deaths, waiting = 0, deque(clips)
    while waiting:
        with worker_pool(1) as pool:
            while waiting:
                clip = waiting.popleft()
                try:
                    result = pool.submit(job, clip).result()
                except BrokenProcessPool:
                    deaths += 1
                    if deaths == len(clips) > 1:
                        raise RuntimeError(
                            f"worker processes die whatever the clip, the last at {clip.relative}"
                        ) from None
                    yield BadClip(file=clip.relative, split=clip.split, reason="a process dies when it reads it")
                    break
                yield result


def _say_scaling(settings: PrepareSettings) -> None:
    least = MINIMUM[settings.codec]
    if settings.short_side is not None and settings.short_side < max(least):
        print(
            f"clips below {least[0]}x{least[1]}, the smallest {settings.codec} that NVDEC decodes, are scaled up to it",
            file=sys.stderr,
        )


def _plan(
    clips: Sequence[SourceClip], splits: Sequence[str], work: Path, settings: PrepareSettings
) -> dict[str, list[list[str]]]:
    """Keys of every shard of every split: random order, shards of about the same number of samples."""
    plan: dict[str, list[list[str]]] = {}
    for split in splits:
        order = shuffled([clip for clip in clips if clip.split == split], settings.seed)
        total = sum(
            file.stat().st_size
            for clip in order
            for extension in (RGB_EXTENSION, FLOW_EXTENSION)
            if (file := _sample_file(work, clip.key, extension)).is_file()
        )
        shards = min(len(order), max(1, -(-total // settings.shard_bytes)))
        cuts = [len(order) * i // shards for i in range(shards + 1)]
        plan[split] = [[clip.key for clip in order[a:b]] for a, b in pairwise(cuts)]
    return plan


def _pack(plan: Mapping[str, list[list[str]]], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Write every shard that has no record yet; returns the records, {"entry": …, "sizes": …}."""
    records: dict[str, list[dict[str, Any]]] = {}
    with Progress(sum(map(len, plan.values())), "shard") as progress:
        for split, shards in plan.items():
            records[split] = []
            for number, keys in enumerate(shards):
                records[split].append(_pack_shard(out, shard_name(split, number), keys))
                progress.step()
    return records


def _pack_shard(out: Path, name: str, keys: Sequence[str]) -> dict[str, Any]:
    work = out / WORK
    record_file = work / "packed" / f"{name}.json"
    if record_file.is_file():
        record: dict[str, Any] = json.loads(record_file.read_bytes())
    else:
        sizes: Counter[str] = Counter()
        with ShardWriter(out / name) as writer:
            for key in keys:
                parts = _read_sample(work, key)
                if INFO_EXTENSION not in parts:
                    raise RuntimeError(
                        f"{key} was prepared, but is not in {work} any more: delete {out} and prepare it again, by one "
                        "process or by shares"
                    )
                info = SampleInfo.from_json(key, parts[INFO_EXTENSION])
                sizes[f"{info.width}x{info.height}"] += 1
                writer.write(key, parts)
        assert writer.entry is not None
        record = {"entry": asdict(writer.entry), "sizes": sizes}
        record_file.parent.mkdir(exist_ok=True)
        write_atomically(record_file, json.dumps(record).encode())
    for key in keys:
        for extension in (RGB_EXTENSION, FLOW_EXTENSION, INFO_EXTENSION):
            _sample_file(work, key, extension).unlink(missing_ok=True)
    return record


def _read_sample(work: Path, key: str) -> dict[str, bytes]:
    files = {e: _sample_file(work, key, e) for e in (RGB_EXTENSION, FLOW_EXTENSION, INFO_EXTENSION)}
    return {extension: file.read_bytes() for extension, file in files.items() if file.is_file()}


def _manifest(
    listing: SourceListing,
    settings: PrepareSettings,
    identity: Mapping[str, Any],
    records: Mapping[str, list[dict[str, Any]]],
    quarantined: Sequence[BadClip],
) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    splits: dict[str, Any] = {}
    missing, bad = (Counter(entry.split for entry in entries) for entries in (listing.missing, quarantined))
    for split, packed in records.items():
        entries = [record["entry"] for record in packed]
        splits[split] = {
            "samples": sum(entry["samples"] for entry in entries),
            "missing": missing[split],
            "quarantined": bad[split],
            "shards": entries,
        }
        for record in packed:
            sizes.update(record["sizes"])
    scale = settings.flow_scale
    return {
        "format": FORMAT,
        "classes": list(listing.classes),
        "official": None if listing.official is None else dict(zip(("lists", "split"), listing.official, strict=True)),
        "splits": splits,
        "video": {
            "codec": settings.codec,
            "fps": None if settings.fps is None else float(settings.fps),
            "short_side": settings.short_side,
            "size": None if settings.size is None else list(settings.size),
            "keyframe_interval": KEYFRAME_INTERVAL,
            "sizes": dict(sizes.most_common()),
        },
        "flow": None
        if scale is None
        else {"codec": settings.codec, "scale": scale, "bound": BOUND, "algorithm": "tvl1"},
        "settings": dict(identity),
        "tools": {
            "python": platform.python_version(),
            "ffmpeg": av.ffmpeg_version_info,
            **{name: version(name) for name in ("av", "numpy", "numba", "webdataset")},
            **({"torch": version("torch")} if settings.flow_device == "cuda" else {}),
        },
    }
