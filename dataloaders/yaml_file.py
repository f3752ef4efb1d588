"""YAML files of settings: experiments, sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dataloaders.errors import UserError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, which would take the last of several equal keys and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's."""
        names: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """The tree of a YAML text; yaml.YAMLError where it is none, or a key of a mapping stands twice."""
    return yaml.load(text, _Loader)  # noqa: S506 - a safe one


def read_mapping(path: Path, wanted: str) -> dict[str, Any]:
    """The mapping that a file holds; none of an empty one.

    Args:
        wanted: what to tell whose file holds something else, such as `a site file is a mapping of settings`.

    Raises:
        UserError: the file is no YAML, or holds no mapping.
    """
    try:
        tree = parse(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, but {wanted}")
    return tree
