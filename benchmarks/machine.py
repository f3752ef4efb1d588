"""What the pages of measurements say of the machine."""

from __future__ import annotations

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
