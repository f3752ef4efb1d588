"""Samples that another data set has already: official splits, and class maps, are cuts of the same videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dataloaders.errors import DecodeError, UserError
from dataloaders.shards import INFO_EXTENSION, DataSet, SampleInfo, ShardReader, hashes_of
from dataloaders.sources import SourceClip
from dataloaders.transcode import PrepareSettings, changed_settings

_OF_THE_WHOLE = ("seed", "shard_bytes")
"""Settings that decide the order of the samples, not their bytes."""


def open_donors(locations: Sequence[str | Path], settings: PrepareSettings) -> tuple[DataSet, ...]:
    """Open data sets whose samples can stand in one of these settings.

    Raises:
        UserError: one cannot be opened, or was prepared with settings that give other bytes.
        RuntimeError: the server of one cannot be reached.
    """
    donors = tuple(map(DataSet.open, locations))
    wanted = settings.to_json()
    for donor in donors:
        other = [
            f"{name} {there} (here {here})"
            for name, (there, here) in changed_settings(donor.preparation, wanted).items()
            if name not in _OF_THE_WHOLE
        ]
        if other:
            raise UserError(
                f"the samples of {donor.location} cannot be reused, they have other settings: {', '.join(other)}; "
                "prepare with the same, or without --reuse"
            )
    return donors


def take_over(clips: Sequence[SourceClip], donors: Sequence[DataSet]) -> Iterator[tuple[SourceClip, dict[str, bytes]]]:
    """Those of the clips that a donor holds, with what `transcode` would make of them, but for its label.

    A sample is taken for a clip of the same relative path and file size whose parts have the hashes that they were
    written with. What a donor holds damaged is passed over.

    Raises:
        UserError: a donor's shard or its index is missing or damaged.
        RuntimeError: the server of one cannot be reached.
    """
    wanted = {clip.key: clip for clip in clips}
    for donor in donors:
        for shard in (shard for split in donor.splits for shard in donor.shards(split)):
            if not wanted:
                return
            with shard.open() as reader:
                for index in range(len(reader)):
                    clip = wanted.get(reader.key(index))
                    parts = None if clip is None else _relabelled(reader, index, clip)
                    if clip is not None and parts is not None:
                        del wanted[clip.key]
                        yield clip, parts


def _relabelled(reader: ShardReader, index: int, clip: SourceClip) -> dict[str, bytes] | None:
    """The sample's parts under the clip's label; None where it is not this clip's, or damaged."""
    try:
        parts = reader.read(index)
        info = SampleInfo.from_json(clip.key, parts.pop(INFO_EXTENSION))
    except (DecodeError, KeyError):
        return None
    if info.sha256 != hashes_of(parts) or (info.source, info.source_bytes) != (clip.relative, clip.path.stat().st_size):
        return None
    relabelled = replace(info, label=clip.label, class_name=clip.class_name)
    return {**parts, INFO_EXTENSION: relabelled.to_json()}
