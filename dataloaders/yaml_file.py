"""YAML files of settings: experiments, sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dataloaders.errors import UserError


def read_mapping(path: Path, wanted: str) -> dict[str, Any]:
    """The mapping that a file holds; none of an empty one.

    Args:
        wanted: what to tell whose file holds something else, such as `a site file is a mapping of settings`.

    Raises:
        UserError: the file is no YAML, or holds no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, but {wanted}")
    return tree
