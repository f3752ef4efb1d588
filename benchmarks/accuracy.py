"""Accuracy on generated clips and on Weizmann, several seeds, one row per run.

    python benchmarks/accuracy.py                           every run that accuracy.jsonl lacks, then the page
    python benchmarks/accuracy.py --only demo/rev2net       runs whose name starts so
    python benchmarks/accuracy.py --page                    the page alone, from accuracy.jsonl

Each run is `deepspeed --num_gpus 2 --module rev2net train configs/X.yaml ...`, last checkpoint, no choice by
validation clips. Weizmann's real clips are looked for in ../shared. A finished run is never repeated: remove its line
from accuracy.jsonl for that.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev

from trainings import (
    ROOT,
    asked,
    by_precision,
    command,
    each_run,
    generated,
    keep,
    precision,
    real,
    result_of,
    without_absent,
)

LOG = ROOT / "benchmarks" / "accuracy.jsonl"
PAGE = ROOT / "benchmarks" / "accuracy.md"
WORK = ROOT / "runs" / "accuracy"

I3D = ("model.name=i3d", "loss.ddp=none")
VARIANTS: dict[str, tuple[str, ...]] = {
    "rev2net": (),
    "i3d": I3D,
    "rev2net-no-ddp": ("loss.ddp=none",),
    "rev2net-half": ("train.duration=120steps", "loss.ddp_low_from=40steps"),
    "rev2net-rms-rms": ("loss.reduction=rms",),
    "rev2net-rms-frobenius": ("loss.reduction=rms", "loss.ddp_low_reduction=frobenius"),
    "rev2net-frobenius-frobenius": ("loss.ddp_low_reduction=frobenius",),
}
"""Names after reconstruction and ddp_low reduction; `rev2net` alone is what the configuration says (frobenius, rms),
`half` a training of half the steps (`make demo` has time for a little less)."""


@dataclass(frozen=True)
class Run:
    """One training: configuration, variant and seed."""

    config: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """As written in the first column."""
        return f"{self.config}/{self.variant}/{self.seed}"


def plan() -> list[Run]:
    """All runs, the ones that matter most first."""
    first = [Run(c, v, s) for c in ("weizmann", "demo") for s in range(3) for v in ("rev2net", "i3d")]
    no_ddp = [Run(c, "rev2net-no-ddp", s) for s in range(3) for c in ("weizmann", "demo")]
    others = [v for v in VARIANTS if "rms" in v or "frobenius" in v]
    compared = [Run(c, v, s) for c in ("demo", "weizmann") for s in range(3) for v in others]
    return [*first, *no_ddp, Run("demo", "rev2net-half", 0), *compared]


def prepared(config: str) -> Path:
    """The data set of a configuration, prepared once."""
    data = WORK / f"{config}-data"
    return generated(WORK / "clips", data) if config == "demo" else real(config, data)


def train(run: Run, data: Path) -> dict[str, object]:
    """Train, test, and return the row."""
    from rev2net.config import load_config

    output = WORK / run.name.replace("/", "-")
    if (output / "result.json").exists():  # finished, but its row was removed: to be done anew
        shutil.rmtree(output)
    started = time.perf_counter()
    command(
        *("deepspeed", "--num_gpus", "2", "--module", "rev2net", "train", f"configs/{run.config}.yaml"),
        *(f"data.path={data}", f"output={output}", f"train.seed={run.seed}", *VARIANTS[run.variant]),
    )
    seconds = time.perf_counter() - started
    result = result_of(output)
    row = {"run": run.name, "date": str(date.today()), "seconds": round(seconds), "steps": result["step"]}
    row["precision"] = precision(result["checkpoint"])
    row |= {k: round(v, 4) for k, v in result["metrics"].items()}
    row |= history(result, data, load_config(output / "config.yaml").train.global_batch)
    if run.config == "demo":
        scores = output / "backwards.json"
        command("rev2net", "eval", output, data, "--views", "1x1", "--backwards", "--json", scores)
        row["backwards_opposite"] = opposite_share(json.loads(scores.read_text()))
    return row


def history(result: dict[str, str], data: Path, batch: int) -> dict[str, float]:
    """Each loss term's mean over the first epoch and over the last ten steps' line, read back from MLflow."""
    from mlflow.tracking import MlflowClient

    from dataloaders.shards import DataSet

    client = MlflowClient(result["tracking_uri"])
    epoch = DataSet.open(data).num_samples("train") / batch
    row = {}
    for term in ("ce", "flow", "frame", "ddp_high", "ddp_low"):
        values = client.get_metric_history(result["run_id"], f"loss/{term}")
        if values:
            row[f"{term}_first_epoch"] = round(mean(m.value for m in values if m.step <= max(10, epoch)), 4)
            row[f"{term}_end"] = round(mean(m.value for m in values[-3:]), 4)
    waits = [m.value for m in client.get_metric_history(result["run_id"], "data_wait_share")]
    row["data_wait_share"] = round(mean(waits[1:]), 5)
    return row


def opposite_share(scores: dict[str, list[list[int]]]) -> float:
    """Share of the clips played backwards that are taken for the opposite class."""
    from dataloaders.scenes import OPPOSITE

    classes, confusion = scores["classes"], scores["confusion"]
    hits = sum(confusion[i][classes.index(OPPOSITE[name])] for i, name in enumerate(classes))  # type: ignore[index]
    return round(hits / sum(map(sum, confusion)), 4)


def page(found: list[dict[str, object]]) -> str:
    """The Markdown page."""
    lines = [
        "# Accuracy, from scratch, at small size",
        "",
        "Generated by `make accuracy` from `accuracy.jsonl`; every row is one training of the configuration named, two",
        f"CPU processes, ZeRO-1, last checkpoint, {by_precision(found)}. Neither seeds nor checkpoints",
        "were chosen by validation clips; the settings were (`docs/decisions.md`). Chance is 12.5 % for `demo`",
        "(generated clips, domain a, 80 validation clips), 25 % for `weizmann` (people 7-9, 12 clips).",
        "Variants with two reductions name that of the reconstructions first, then that of ddp_low; `rev2net` is",
        "frobenius and rms. Seconds are the clock's, on a machine that had other work at times.",
        "",
        "| configuration | variant | seeds | mean top-1 | std error | each seed | backwards = opposite | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [summary(*which) for which in groups(found)]
    lines += [
        "",
        "## Decoders",
        "",
        "Root mean square errors on the validation clips: flow in pixels beside that of zero flow, frames (-1 to 1)",
        "beside that of the clip's mean frame. Losses: mean of the first epoch (at least ten steps) and of the last 30",
        "steps. Means over the seeds.",
        "",
        "| configuration | variant | flow | zero flow | frames | mean frame | ce | flow loss | frame loss | ddp_high "
        "end | ddp_low end |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [decoders(*which) for which in groups([row for row in found if "val/flow_rmse" in row])]
    lines += ["", "## Each run", ""]
    return "\n".join([*lines, *each_run(found)]) + "\n"


def groups(found: Sequence[dict[str, object]]) -> Iterator[tuple[str, str, list[dict[str, object]]]]:
    """Configuration, variant and the rows of its seeds, for those that have any."""
    for config in ("demo", "weizmann"):
        for variant in VARIANTS:
            group = [row for row in found if str(row["run"]).startswith(f"{config}/{variant}/")]
            if group:
                yield config, variant, group


def decoders(config: str, variant: str, group: Sequence[dict[str, object]]) -> str:
    """One line of the second table."""

    def average(key: str) -> str:
        return f"{mean(float(str(r[key])) for r in group):.3g}"

    errors = (average(f"val/{key}") for key in ("flow_rmse", "flow_rmse_zero", "frame_rmse", "frame_rmse_mean"))
    losses = (f"{average(f'{term}_first_epoch')} to {average(f'{term}_end')}" for term in ("ce", "flow", "frame"))
    ends = (average(f"{term}_end") for term in ("ddp_high", "ddp_low"))
    return f"| {config} | {variant} | {' | '.join((*errors, *losses, *ends))} |"


def summary(config: str, variant: str, group: Sequence[dict[str, object]]) -> str:
    """One line of the first table."""
    top1 = [float(str(r["val/top1"])) for r in group]
    error = f"{stdev(top1) / len(top1) ** 0.5:.1%}" if len(top1) > 1 else ""
    backwards = [float(str(r["backwards_opposite"])) for r in group if "backwards_opposite" in r]
    shown = f"{mean(backwards):.0%}" if backwards else ""
    each = ", ".join(f"{t:.1%}" for t in top1)
    seconds = mean(float(str(r["seconds"])) for r in group)
    return f"| {config} | {variant} | {len(top1)} | {mean(top1):.1%} | {error} | {each} | {shown} | {seconds:.0f} |"


def main() -> int:
    """See the module."""
    left = without_absent(asked(__doc__, plan(), LOG), lambda run: run.config if run.config == "weizmann" else None)
    data = {config: prepared(config) for config in dict.fromkeys(run.config for run in left)}
    keep((train(run, data[run.config]) for run in left), LOG, PAGE, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
