"""Run under torchrun: clips of NaN on the last rank, one step's and then three steps', under ZeRO stages 0, 1 and 3.

A step has two micro-batches on each rank, of which the first is the bad one. At step 3 the loss is finite, but its
gradients are not. Arguments: data folder, output folder. Rank 0 writes one JSON line per stage.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import TINY

from dataloaders.batch import ClipBatch
from rev2net import checkpoint, snapshot
from rev2net.config import load_config
from rev2net.train import NonFiniteLossError, TrainingRun

BAD = (2, 5, 6, 7)
"""Steps, counted from 1, whose clips are NaN on the last rank."""

STEEP = 3
"""The step whose gradients are not finite."""


class Poisoned:
    """A batch whose clips are NaN once they are on the device."""

    def __init__(self, batch: ClipBatch) -> None:
        self._batch = batch
        self.keys = batch.keys

    def to(self, *args: Any, **named: Any) -> ClipBatch:
        """As of `ClipBatch`."""
        ready = self._batch.to(*args, **named)
        return replace(ready, video=torch.full_like(ready.video, torch.nan))


class PoisonedLoader:
    """A run's loader, some of whose batches are poisoned."""

    def __init__(self, run: TrainingRun) -> None:
        self._loader, self._run, self._number = run.loaders[0], run, 0

    def __next__(self) -> Any:
        """The next batch."""
        step, index = divmod(self._number, self._run.accumulation)
        self._number += 1
        ranks = self._run.ranks
        bad = ranks.rank == ranks.world_size - 1 and step + 1 in BAD and index == 0
        return Poisoned(next(self._loader)) if bad else next(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def state(run: TrainingRun) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    taken = run.ranks.broadcast(snapshot.take(run.engine))
    buffers = {f"ranks/{name}": parts for name, parts in taken.buffers.items()}
    return {**taken.weights, **taken.optimizer, **buffers}


class Steep(torch.autograd.Function):
    """Identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        """The value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Infinity."""
        return torch.full_like(gradient, torch.inf)


def steepen(run: TrainingRun) -> None:
    """Make the gradients of step `STEEP` infinite on the last rank."""

    def hook(module: torch.nn.Module, inputs: Any, scalars: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if run.step + 1 != STEEP or run.ranks.rank != run.ranks.world_size - 1:
            return scalars
        return {**scalars, "loss/total": Steep.apply(scalars["loss/total"])}

    run.engine.step_module.register_forward_hook(hook)


def main() -> None:
    """All stages, one after the other, in this process group."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    data, output = sys.argv[1:]
    for stage in (0, 1, 3):  # 2 takes the way of 1
        words = [
            f"data.path={data}",
            f"output={output}/zero{stage}",
            f"train.zero_stage={stage}",
            "train.micro_batch=2",
        ]
        run = TrainingRun(load_config("configs/demo.yaml", [*TINY, *words, "tracking.enabled=false"]))
        run.loaders = [PoisonedLoader(run)]  # type: ignore[list-item]
        steepen(run)
        found: list[Any] = []
        before = state(run)
        message = ""
        try:
            while run.step < 8:
                scalars, _ = run.train_step()
                after = state(run)
                same = all(before[name].equal(after[name]) for name in before)
                finite = all(bool(tensor.isfinite().all()) for tensor in after.values())
                found.append((run.step, bool(scalars), same, finite))
                before = after
                if stage == 1 and run.step == 4:  # saved and evaluated: it is what the run goes back to
                    run.save()
                    run.finish_saving()
                    if run.ranks.first:
                        checkpoint.write_evaluation(checkpoint.folder_of(run.folder, 4), {"val/top1": 0.5})
        except NonFiniteLossError as error:
            message = str(error)
        saved = checkpoint.latest(run.folder)
        assert saved is not None
        kept = checkpoint.read_tensors(saved, "weights") | checkpoint.read_tensors(saved, "optimizer")
        whole = all(kept[name].equal(before[name]) for name in kept)
        run.leave()
        resumed = TrainingRun(run.config)
        updates = {float(s["step"]) for s in resumed.engine.torch_optimizer.state.values()}
        run.loaders[0].close()
        resumed.loaders[0].close()
        if run.ranks.first:
            row = {"steps": found, "message": message, "saved": saved.name, "whole": whole}
            row |= {"resumed": (resumed.step, resumed.skipped, sorted(updates))}
            row |= {"evaluation": checkpoint.read_evaluation(saved)}
            with Path(output, "stages.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
