"""Run under torchrun: for every ZeRO stage and optimizer, save, restore and go on.

Arguments: data folder, output folder, which cases. Rank 0 writes cases.json: for each case the losses of the steps, and
the bytes of the optimizer's state on each rank.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from tiny import TINY

from rev2net import snapshot
from rev2net.config import Config, load_config
from rev2net.distributed import computes_in_bf16
from rev2net.train import TrainingRun

FIRST, LAST = 3, 5
ALL = (
    *itertools.product((0, 1, 2, 3), ("sgd", "adamw"), ("fp32", "bf16")),
    (0, "adamw", "fp16"),  # seconds a step on a CPU; its first steps overflow, so the scale of the loss has changed
)
SOME = (
    *((0, "sgd", "fp32"), (2, "sgd", "fp32"), (3, "sgd", "fp32")),
    *((0, "adamw", "bf16"), (1, "adamw", "bf16"), (3, "adamw", "bf16")),
)


STOP = 1
"""Steps done when the last rank, and no other, wants to stop."""


def losses(run: TrainingRun, until: int) -> list[float]:
    """Train to a step; the total loss of each step."""
    found, skipped = [], []
    while run.step < until:
        before = run.step
        scalars, stopped = run.train_step()
        assert stopped == (before == STOP), "all ranks stop when one wants to"
        found.append(scalars["loss/total"])
        skipped.append(scalars.get("scaler/skipped"))
    if until == FIRST and run.config.train.precision == "fp16":
        assert 1.0 in skipped, "this case is here for its overflows"
    return found


def begin(config: Config) -> TrainingRun:
    """A run whose last rank wants to stop once."""
    run = TrainingRun(config, lambda: run.ranks.rank == run.ranks.world_size - 1 and run.step == STOP)
    return run


def main() -> None:
    """All cases, one after the other, in this process group."""
    data, output, cases = sys.argv[1:]
    results: dict[str, dict[str, object]] = {}
    for stage, optimizer, precision in {"all": ALL, "some": SOME}[cases]:
        if cases == "some" and precision == "bf16" and not computes_in_bf16(torch.device("cpu")):
            precision = "fp32"  # emulated it takes minutes; with all cases it is done all the same
        case = f"zero{stage}-{optimizer}-{precision}"
        config = load_config(
            "configs/demo.yaml",
            [
                *TINY,
                f"data.path={data}",
                f"output={output}/{case}",
                f"train.zero_stage={stage}",
                f"optim.name={optimizer}",
                "optim.lr=1e-4",
                f"train.precision={precision}",
                "tracking.enabled=false",
            ],
        )
        unbroken = begin(config)
        before = losses(unbroken, FIRST)
        unbroken.save()
        unbroken.finish_saving()
        weights = snapshot.gather_weights(unbroken.engine)
        scale = unbroken.engine.loss_scale
        after = losses(unbroken, LAST)
        held = unbroken.ranks.gather(unbroken.engine.optimizer_bytes)
        unbroken.loaders[0].close()
        unbroken.leave()
        resumed = begin(config)
        assert resumed.step == FIRST
        restored = snapshot.gather_weights(resumed.engine)
        assert all(torch.equal(weights[name], restored[name]) for name in weights)
        assert resumed.engine.loss_scale == scale
        again = losses(resumed, LAST)
        resumed.loaders[0].close()
        resumed.leave()
        results[case] = {"before": before, "after": after, "again": again, "held": held}
    if unbroken.ranks.first:
        Path(output, "cases.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
