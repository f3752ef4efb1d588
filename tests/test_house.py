"""The shape of the house: which package may import which, and a help for every command."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import cli as cluster_cli
from rev2net import cli

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


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The program and all its sub-commands."""
    yield parser.prog
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from commands(part)


@pytest.mark.parametrize("command", [*commands(cli.build_parser()), *commands(cluster_cli._parser())])
def test_every_command_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = command.split()
    with pytest.raises(SystemExit) as ended:
        {"rev2net": cli, "rev2net-cluster": cluster_cli}[program].main([*words, "--help"])
    assert ended.value.code == 0 and f"usage: {command} " in capsys.readouterr().out
