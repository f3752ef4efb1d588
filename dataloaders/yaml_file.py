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
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, wanted: str) -> dict[str, Any]:
    """The mapping that a file holds; none of an empty one.

    Args:
        wanted: what to tell whose file holds something else, such as `a site file is a mapping of settings`.

    Raises:
        UserError: the file is no YAML, or holds no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}  # noqa: S506 - a safe one
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, but {wanted}")
    return tree
