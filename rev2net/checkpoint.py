"""Checkpoints on disk: whole tensors by parameter name, which know nothing of the number of ranks.

A checkpoint is a folder `step-00000150/` with `weights.safetensors` (parameters, and batch-normalisation
statistics averaged over the ranks), `optimizer.safetensors` (whole states as `parameter/state`),
`buffers.safetensors` (the ranks' own statistics, [ranks, ...] each) and `state.json`, which holds size and hash of
the others. It is written aside and renamed into place; the file `latest` moves last. The evaluation of its weights
comes later, as `evaluation.json`, and the file `best` names the checkpoint with the best one. No random state is
needed: see `Engine.forward_backward`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataloaders.errors import UserError
from dataloaders.shards import file_sha256, write_atomically
from rev2net.config import Config, config_from_tree
from rev2net.models.build import build_encoder, build_network
from rev2net.models.heads import Network
from rev2net.snapshot import Snapshot

log = logging.getLogger("rev2net")

LATEST, BEST = "latest", "best"
FORMAT = 4
TENSORS = ("weights", "optimizer", "buffers")
METRIC = "val/top1"
"""Of an evaluation: the best checkpoint is the one in which it is highest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run needs beside tensors to go on.

    Attributes:
        step: optimizer steps done; also the position in the sample order (step x global batch).
        run_id: the MLflow run, or None.
        classes: class names, in order of the logits.
        world_size: number of ranks that wrote the checkpoint.
        config: the configuration that it was written under.
        preparation: how the videos were prepared that it learned from (`DataSet.preparation`).
        updates: updates that the optimizer has made; fewer than steps where some were skipped.
        skipped: how many of the steps did not change the weights, because the loss or gradients were not finite.
        replaced: how many clips could not be decoded so far.
        loss_scale: of fp16's scaler; None without one.
        log: sums of the losses that no line of the log has told of yet (`StepLog.begun`).
        official: the official lists and split that its data is of (`DataSet.official`); empty where it is of none.
        target_official: the same of the target domain.
        trained_on: the fingerprints of what it learns from, `data` and perhaps `target`; empty in older checkpoints.
    """

    step: int
    run_id: str | None
    classes: tuple[str, ...]
    world_size: int
    config: dict[str, Any]
    preparation: dict[str, Any]
    updates: int
    skipped: int = 0
    replaced: int = 0
    loss_scale: dict[str, float] | None = None
    log: dict[str, Any] = field(default_factory=dict)
    official: dict[str, Any] = field(default_factory=dict)
    target_official: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time, while the training goes on.

    The interpreter does not end before the checkpoint under way is written.

    Args:
        folder: of the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def start(self, snapshot: Snapshot, state: RunState, keep: int | None) -> None:
        """Begin to write; then those before it are dropped but the last `keep`, itself included, and the best (None:
        none are). Later ones, of steps that are done again, are written over in their turn.

        The one before must have been waited for.
        """
        assert self._under_way is None
        self._under_way = self._thread.submit(self._write, snapshot, state, keep)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way could not be written; `wait` says why."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> str | None:
        """Wait until the checkpoint under way is on disk; why it could not be written, or None."""
        under_way, self._under_way = self._under_way, None
        error = None if under_way is None else under_way.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        return None if error is None else str(error)

    def _write(self, snapshot: Snapshot, state: RunState, keep: int | None) -> None:
        begin = time.perf_counter()
        target = write(self.folder, snapshot, state)
        log.info("saved %s in %.1f s", target, time.perf_counter() - begin)
        if keep is not None:
            until = [each for each in checkpoints(self.folder) if each <= target]
            kept = {*until[-keep:], best(self.folder)}
            for old in until:
                if old not in kept:
                    _drop(old)


def _drop(old: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:  # protected, open elsewhere on NFS, or gone already: the new checkpoint is whole
        log.warning("%s, which is no longer needed, could not be removed: %s", old, error)


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step, under a run's `checkpoints` folder."""
    return folder / f"step-{step:08d}"


def write(folder: Path, snapshot: Snapshot, state: RunState) -> Path:
    """Write a checkpoint under `folder`: all of it or nothing, and `latest` last.

    Raises:
        OSError: the disk is full or not writable. The previous checkpoint is untouched.
    """
    target = folder_of(folder, state.step)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        files = {}
        for name in TENSORS:
            file = aside / f"{name}.safetensors"
            save_file(dict(getattr(snapshot, name)), file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        tree = {"format": FORMAT, "files": files, **asdict(state)}
        (aside / "state.json").write_text(json.dumps(tree, indent=1))
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        write_atomically(folder / LATEST, target.name.encode())
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"checkpoint {target} could not be written ({error}); the previous one is untouched") from error
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path, *names: str) -> str | None:
    """What is wrong with a checkpoint's files (size, hash), or with those so named; None if nothing is. Reads them.

    Raises:
        OSError: a file is there and cannot be read, which says nothing about what it holds.
    """
    try:
        files = json.loads((checkpoint / "state.json").read_text())["files"]
        for name in names or files:
            entry = files[name]
            size = (checkpoint / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
            if file_sha256(checkpoint / name) != entry["sha256"]:
                return f"{name} does not have the hash that it was written with"
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest one if that is gone; None where there is none."""
    named = _named(folder, LATEST)
    found = checkpoints(folder)
    return named or (found[-1] if found else None)


def _named(folder: Path, pointer: str) -> Path | None:
    file = folder / pointer
    named = folder / file.read_text().strip() if file.is_file() else None
    return named if named is not None and (named / "state.json").is_file() else None


def recover(folder: Path) -> Path | None:
    """The checkpoint to go on from: the latest that is whole. None where there is none.

    What a crash left half written is removed; a damaged checkpoint is told of and put aside as `.damaged-step-*`.

    Raises:
        OSError: one cannot be read now; it may be whole.
        UserError: all were damaged. To train from the start is for the user to decide.
    """
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for partial in folder.glob("*.tmp"):
        partial.unlink()
    while (found := latest(folder)) is not None:
        try:
            wrong = damage(found)
        except OSError as error:
            raise OSError(f"{found} cannot be read ({error}): run the same command again once it can") from error
        if wrong is None:
            return found
        aside = found.with_name(f".damaged-{found.name}")
        log.warning("%s is damaged (%s): it is put aside as %s", found, wrong, aside.name)
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
    if any(folder.glob(".damaged-*")):
        raise UserError(
            f"all checkpoints in {folder} were damaged and are put aside: delete that folder to train from the start, "
            "or choose another output="
        )
    return None


def write_evaluation(checkpoint: Path, values: Mapping[str, float]) -> bool:
    """Keep what the evaluation of a checkpoint's weights gave; True where it is the run's best, which `best` names."""
    write_atomically(checkpoint / "evaluation.json", json.dumps(dict(values), indent=1).encode())
    is_best = best(checkpoint.parent) == checkpoint
    if is_best:
        write_atomically(checkpoint.parent / BEST, checkpoint.name.encode())
    return is_best


def read_evaluation(checkpoint: Path) -> dict[str, float] | None:
    """What `write_evaluation` kept; None where there was no evaluation."""
    file = checkpoint / "evaluation.json"
    values: dict[str, float] | None = json.loads(file.read_text()) if file.is_file() else None
    return values


def best(folder: Path) -> Path | None:
    """The checkpoint with the highest validation accuracy, the earlier one of equals; None before any evaluation."""
    found = [(values[METRIC], path) for path in checkpoints(folder) if (values := read_evaluation(path)) is not None]
    return max(found, key=lambda entry: entry[0])[1] if found else None


def is_file_of_weights(path: str | Path) -> bool:
    """Whether it is a file, published weights say, and not what `find` finds a checkpoint by."""
    return Path(path).is_file() and Path(path).name not in (LATEST, BEST)


def find(path: str | Path) -> Path:
    """A checkpoint from what a user gives: its folder, the run's folder, its `checkpoints` folder, or `latest` or
    `best` in that.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    named = _named(path.parent, path.name) if path.name in (LATEST, BEST) else None
    if named is not None:
        return named
    for folder in (path, path / "checkpoints"):
        found = latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    raise UserError(
        f"there is no checkpoint at {path}: give a run's output folder, one of its checkpoints/step-* folders, or "
        "checkpoints/best (init_from also takes a published file of weights)"
    )


def read_state(checkpoint: Path) -> RunState:
    """Read `state.json`.

    Raises:
        UserError: not a checkpoint of ours.
    """
    try:
        tree = json.loads((checkpoint / "state.json").read_text())
        if tree.pop("format") != FORMAT:
            raise UserError(f"{checkpoint} has another checkpoint format than {FORMAT}: use the version that wrote it")
        del tree["files"]
        return RunState(**{**tree, "classes": tuple(tree["classes"])})
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{checkpoint}/state.json cannot be read ({error}): choose another checkpoint") from None


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """One of the files "weights", "optimizer", "buffers".

    Raises:
        UserError: missing or damaged.
    """
    file = checkpoint / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): choose another checkpoint") from None


def load_weights(network: nn.Module, checkpoint: Path) -> None:
    """Load parameters and averaged statistics into a network of the same architecture.

    Raises:
        UserError: the architecture is another one (the first difference is named).
    """
    weights = read_tensors(checkpoint, "weights")
    own = network.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = own.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            mine = "absent" if here is None else f"{tuple(here.shape)}"
            theirs = "absent" if there is None else f"{tuple(there.shape)}"
            raise UserError(
                f"{checkpoint} is of another architecture: {name} is {theirs} there and {mine} here; use the "
                "configuration that it was trained with, another output folder, or init_from= to take over what fits"
            )
    network.load_state_dict(weights)


def check_weights(checkpoint: Path) -> Path:
    """The file of its weights, compared with its hash: what is damaged would give numbers all the same.

    Raises:
        UserError: damaged.
    """
    wrong = damage(checkpoint, "weights.safetensors")
    if wrong is not None:
        raise UserError(
            f"{checkpoint} is damaged ({wrong}): choose another one (`rev2net checkpoint verify` looks at all of a run)"
        )
    return checkpoint / "weights.safetensors"


def load_encoder(checkpoint: Path) -> tuple[nn.Module, Config, RunState]:
    """The test-time network of a checkpoint: the encoder alone, in evaluation mode.

    Raises:
        UserError: not a checkpoint of ours, or its weights are damaged.
    """
    state = read_state(checkpoint)
    config = config_from_tree(state.config)
    encoder = build_encoder(config, len(state.classes))
    prefix = "encoder."
    check_weights(checkpoint)
    weights = {
        k.removeprefix(prefix): v for k, v in read_tensors(checkpoint, "weights").items() if k.startswith(prefix)
    }
    encoder.load_state_dict(weights)
    return encoder.eval(), config, state


def load_network(checkpoint: Path) -> tuple[Network, Config, RunState]:
    """The training-time network of a checkpoint, decoders included, in evaluation mode.

    Raises:
        UserError: not a checkpoint of ours, or its weights are damaged.
    """
    state = read_state(checkpoint)
    config = config_from_tree({**state.config, "model": {**state.config["model"], "imagenet": None}})
    network = build_network(config, len(state.classes))
    check_weights(checkpoint)
    load_weights(network, checkpoint)
    return network.eval(), config, state
