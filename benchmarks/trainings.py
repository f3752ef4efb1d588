"""What the benchmarks that train share: running commands, data sets, rows that sittings add up, their tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rev2net.checkpoint import read_state

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""Real clips, beside the checkout: `videos`, and in `annotations` a folder with train.txt and val.txt for each set."""


class Named(Protocol):
    """A run with the name that its row has."""

    @property
    def name(self) -> str: ...  # noqa: D102


R = TypeVar("R", bound=Named)

_OPTIONS = ("--codec", "vp9", "--short-side", "128")


def command(*words: str | Path, log: Path | None = None) -> None:
    """Run a command of the project, output to the terminal or added to a file."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with contextlib.nullcontext() if log is None else log.open("a") as out:
        subprocess.run([str(w) for w in words], check=True, cwd=ROOT, env=env, stdout=out, stderr=out)


def generated(clips: Path, data: Path, *options: str) -> Path:
    """`data`, prepared once from clips that `rev2net synth` renders with these options."""
    command("rev2net", "synth", clips, *options)
    command("rev2net", "prepare", "folder", clips, data, *_OPTIONS)
    return data


def real(name: str, data: Path) -> Path:
    """`data`, prepared once from a folder of real clips and its lists."""
    command("rev2net", "prepare", "list", SHARED / "annotations" / name, data, "--root", SHARED / "videos", *_OPTIONS)
    return data


def without_absent(runs: Sequence[R], real_set: Callable[[R], str | None]) -> list[R]:
    """The runs but those of a set of real clips (None: of generated ones) that is not here, which are named."""
    there = [run for run in runs if (name := real_set(run)) is None or (SHARED / "annotations" / name).is_dir()]
    if len(there) < len(runs):
        print(f"{len(runs) - len(there)} runs are left out: their real clips are not in {SHARED}")
    return there


def result_of(output: Path) -> dict[str, Any]:
    """What a finished training says of itself."""
    result: dict[str, Any] = json.loads((output / "result.json").read_text())
    return result


def precision(checkpoint: str) -> str:
    """What a training computed in: fp32 or bf16."""
    return str(read_state(Path(checkpoint)).config["train"]["precision"])


def by_precision(found: Iterable[dict[str, Any]]) -> str:
    """How many of the rows' trainings were made in which precision."""
    return " and ".join(f"{count} in {name}" for name, count in Counter(r["precision"] for r in found).most_common())


def logged(output: Path, name: str) -> list[float]:
    """The values of a metric that a training has logged, from its outbox for MLflow."""
    entries = [json.loads(line) for line in (output / "outbox.jsonl").read_text().splitlines()]
    return [entry["values"][name] for entry in entries if name in entry.get("values", {})]


def rows(log: Path) -> list[dict[str, Any]]:
    """The rows written so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def asked(about: str | None, plan: Sequence[R], log: Path) -> list[R]:
    """Those of the plan that have no row yet and that the command line asks for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="runs whose name starts so, or so")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    finished = {row["run"] for row in rows(log)}
    return [run for run in plan if not (args.page or run.name in finished) and run.name.startswith(tuple(args.only))]


def keep(made: Iterable[dict[str, Any]], log: Path, file: Path, page: Callable[[list[dict[str, Any]]], str]) -> None:
    """Add each row to the log as it comes, and write the page anew; without rows the page alone."""
    for row in made:
        with log.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        file.write_text(page(rows(log)))
    file.write_text(page(rows(log)))


def each_run(found: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table of everything that the rows say."""
    columns = list(dict.fromkeys(key for row in found for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in found]
