"""The shape of the house: which package may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "dataloaders": {"dataloaders"},
    "rev2net": {"rev2net", "dataloaders"},
    "cluster": {"cluster", "rev2net", "dataloaders"},
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} & MAY_IMPORT.keys():
                assert top in MAY_IMPORT[package], f"{file} imports {top}"
