"""A filter on classes: which to keep, and under which common name those of several data sets go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dataloaders.errors import UserError
from dataloaders.sources import SourceClip, SourceListing
from dataloaders.yaml_file import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMap:
    """Names to keep.

    Attributes:
        classes: the new names, in the order of the new labels.
        sources: a source's class name -> the new name.
    """

    classes: tuple[str, ...]
    sources: dict[str, str]

    def _names_of(self, new: str) -> list[str]:
        return [name for name, other in self.sources.items() if other == new]

    def apply(self, listing: SourceListing) -> SourceListing:
        """The clips of the named classes with new names and labels; all others are left out.

        Raises:
            UserError: a class of the map has no clips in the listing.
        """
        labels = {name: label for label, name in enumerate(self.classes)}

        def kept(clips: Iterable[SourceClip]) -> tuple[SourceClip, ...]:
            return tuple(
                replace(clip, class_name=(name := self.sources[clip.class_name]), label=labels[name])
                for clip in clips
                if clip.class_name in self.sources
            )

        found = {self.sources[name] for name in listing.classes if name in self.sources}
        lacking = [name for name in self.classes if name not in found]
        if lacking:
            names = ", ".join(self._names_of(lacking[0]))
            raise UserError(
                f"the class map's {lacking[0]!r} comes from {names}, but the source has no such class "
                f"({', '.join(listing.classes[:5])}, ...): correct its `from`, or remove it for all data sets"
            )
        clips = kept(listing.clips)
        return replace(listing, classes=self.classes, clips=clips, missing=kept(listing.missing))


def read_class_map(file: Path) -> ClassMap:
    """Read a YAML file `classes: [{name: ..., from: [..., ...], why: ...}, ...]` (`why` is for readers).

    Raises:
        UserError: the file is missing, is not of this form, or a name stands twice.
    """
    form = "a YAML file with `classes: [{name: ride_bike, from: [Biking, ride_bike]}, ...]`"
    if not file.is_file():
        raise UserError(f"class map {file} does not exist; give {form}")
    try:
        tree: Any = parse(file.read_text(encoding="utf-8"))
        pairs = [(str(entry["name"]), [str(name) for name in entry["from"]]) for entry in tree["classes"]]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise UserError(f"class map {file} cannot be read; give {form}") from None
    sources: dict[str, str] = {}
    for name, names in pairs:
        for source in names:
            if source in sources:
                raise UserError(f"class map {file} puts {source!r} under {sources[source]!r} and {name!r}; choose one")
            sources[source] = name
    classes = tuple(name for name, _ in pairs)
    if not classes or len(set(classes)) < len(classes):
        raise UserError(f"class map {file} has no class, or one name twice; every name may stand once")
    return ClassMap(classes=classes, sources=sources)
