"""Clips that kill the process that reads them: what a fault of FFmpeg or the kernel's out-of-memory killer does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from deadly import read

from dataloaders.prepare import _in_processes
from dataloaders.sources import SourceClip


def clips(folder: Path, count: int) -> list[SourceClip]:
    names = [f"{i}.{'bad' if i == 3 else 'good'}" for i in range(count)]
    return [SourceClip(path=folder / n, relative=n, split="train", label=0, class_name="a") for n in names]


def test_p8_a_clip_that_kills_its_process_is_quarantined_and_the_others_are_done(tmp_path: Path) -> None:
    results = list(_in_processes(partial(read, "bad"), clips(tmp_path, 8), 2))
    assert len(results) == 8
    assert [(bad.file, bad.reason) for bad in results if bad] == [("3.bad", "a process dies when it reads it")]
    assert len(list(tmp_path.glob("*.done"))) == 7


def test_processes_that_die_whatever_the_clip_end_the_preparation(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="worker processes die whatever the clip"):
        list(_in_processes(partial(read, ""), clips(tmp_path, 3), 1))
