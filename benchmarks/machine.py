"""What the pages of measurements share: what they say of the machine, and how they are asked for."""

from __future__ import annotations

import argparse
import platform
import re
from pathlib import Path


def cpu_facts() -> tuple[str, tuple[str, ...]]:
    """Model, and those of its instruction sets that matter here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = re.search(r"^flags\s*:\s*(.+)", text, re.MULTILINE)
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    present = tuple(flag for flag in wanted if flags and flag in flags[1].split())
    return (model[1] if model else platform.processor() or "unknown"), present


def page_parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a script that makes a page, with --write; `doc` is what the script says of itself."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="write the page (standard output)")
    return parser


def publish(text: str, file: Path | None) -> None:
    """Write a page, or print it."""
    if file is None:
        print(text)
    else:
        file.write_text(text)
