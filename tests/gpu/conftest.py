"""The GPU tests use the helpers of the other two folders, whichever of them is collected."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "dataloaders"), str(TESTS / "rev2net")]
