"""Checkpoints that know nothing of the number of ranks: whole tensors by parameter name.

A checkpoint is a folder `step-00000150/` with `weights.safetensors` (parameters, and batch-normalisation
statistics averaged over the ranks), `optimizer.safetensors` (whole states as `parameter/state`),
`buffers.safetensors` (each rank's own statistics as `rank/buffer`) and `state.json`. It is written aside and
renamed into place; the file `latest` moves last. No random state is needed: see `Engine.forward_backward`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dataloaders.errors import UserError
from rev2net.config import Config, config_from_tree
from rev2net.distributed import Ranks
from rev2net.engine import Engine, build_encoder, build_network
from rev2net.models.i3d import I3D
from rev2net.models.rev2net import Rev2Net

LATEST = "latest"
FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run needs beside tensors to go on.

    Attributes:
        step: optimizer steps done; also the position in the sample order (step x global batch).
        run_id: the MLflow run, or None.
        classes: class names, in order of the logits.
        world_size: number of ranks that wrote the checkpoint.
        config: the configuration that it was written under.
        updates: updates that the optimizer has made; fewer than steps where some were skipped.
        skipped: how many of the steps did not change the weights, because the loss or gradients were not finite.
        replaced: how many clips could not be decoded so far.
    """

    step: int
    run_id: str | None
    classes: tuple[str, ...]
    world_size: int
    config: dict[str, Any]
    updates: int
    skipped: int = 0
    replaced: int = 0


def _float_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Whole parameters and averaged statistics of the network, on every rank's host memory. A collective.

    Live buffers are not touched: they stay each rank's own.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    network = engine.step_module.network
    weights = {}
    for name, parameter in network.named_parameters():
        whole = parameter if engine.config.train.zero_stage < 3 else safe_get_full_fp32_param(parameter)
        assert whole is not None
        weights[name] = whole.detach().float().cpu().clone(memory_format=torch.contiguous_format)
    for name, buffer in network.named_buffers():
        whole = engine.ranks.mean(buffer.clone()) if buffer.is_floating_point() else buffer
        weights[name] = whole.detach().cpu().clone()
    return weights


def gather_optimizer(engine: Engine) -> dict[str, Tensor]:
    """Whole optimizer states as `parameter/state`, on every rank's host memory. A collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = {}
    for name, parameter in engine.step_module.network.named_parameters():
        for key in engine.state_names:
            if engine.config.train.zero_stage == 0:
                whole = engine.torch_optimizer.state[parameter][key]
            else:
                whole = safe_get_full_optimizer_state(parameter, key)
            states[f"{name}/{key}"] = whole.detach().float().cpu().clone(memory_format=torch.contiguous_format)
    return states


def restore_optimizer(engine: Engine, states: Mapping[str, Tensor], updates: int) -> None:
    """Put whole optimizer states, after so many updates, into whatever partition this engine has. On every rank."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage, ranks = engine.config.train.zero_stage, engine.ranks
    for state in engine.torch_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)
    for name, parameter in engine.step_module.network.named_parameters():
        for key in engine.state_names:
            whole = states[f"{name}/{key}"].to(engine.ranks.device)
            if stage == 0:
                engine.torch_optimizer.state[parameter][key].copy_(whole)
            elif stage == 3:
                # DeepSpeed's own setter of whole states forgets that the last rank's partition is padded.
                size: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
                padded = F.pad(whole.flatten(), (0, size * ranks.world_size - whole.numel()))
                safe_set_local_optimizer_state(parameter, padded[size * ranks.rank : size * (ranks.rank + 1)], key)
            else:
                safe_set_full_optimizer_state(parameter, whole, key)


def gather_buffers(engine: Engine) -> dict[str, Tensor]:
    """Every rank's own statistics as `rank/buffer`. A collective."""
    buffers = _float_buffers(engine.step_module.network)
    flat = torch.cat([b.flatten() for b in buffers.values()])
    flats = [torch.empty_like(flat) for _ in range(engine.ranks.world_size)]
    if engine.ranks.world_size > 1:
        dist.all_gather(flats, flat)
    else:
        flats = [flat]
    sizes = [b.numel() for b in buffers.values()]
    return {
        f"{rank}/{name}": part.cpu().clone().reshape(buffers[name].shape)
        for rank, whole in enumerate(flats)
        for name, part in zip(buffers, torch.split(whole, sizes), strict=True)
    }


def save(engine: Engine, folder: Path, state: RunState, keep: int | None) -> Path:
    """Write a checkpoint under `folder` and drop all but the last `keep` (None: none). A collective; rank 0 writes.

    Raises:
        OSError: the disk is full or not writable. The previous checkpoint is untouched.
    """
    weights, optimizer, buffers = gather_weights(engine), gather_optimizer(engine), gather_buffers(engine)
    target = folder / f"step-{state.step:08d}"
    if engine.ranks.first:
        _write(target, weights, optimizer, buffers, state)
        for old in checkpoints(folder)[:-keep] if keep else ():
            shutil.rmtree(old)
    engine.ranks.barrier()
    return target


def _write(
    target: Path,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    state: RunState,
) -> None:
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name, tensors in (("weights", weights), ("optimizer", optimizer), ("buffers", buffers)):
            save_file(dict(tensors), aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1))
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        pointer = target.parent / f".{LATEST}.partial"
        pointer.write_text(target.name)
        _sync(pointer)
        os.replace(pointer, target.parent / LATEST)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"checkpoint {target} could not be written ({error}); the previous one is untouched") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").is_file())


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest one if that is gone; None where there is none."""
    pointer = folder / LATEST
    if pointer.is_file():
        named = folder / pointer.read_text().strip()
        if (named / "state.json").is_file():
            return named
    found = checkpoints(folder)
    return found[-1] if found else None


def find(path: str | Path) -> Path:
    """A checkpoint from what a user gives: its folder, the run's folder, or the run's `checkpoints` folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        found = latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    raise UserError(
        f"there is no checkpoint at {path}: give a run's output folder or one of its checkpoints/step-* folders"
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


def load_own_buffers(network: nn.Module, checkpoint: Path, ranks: Ranks) -> None:
    """Put this rank's own statistics back, where the checkpoint was written on the same number of ranks."""
    buffers = read_tensors(checkpoint, "buffers")
    for name, buffer in _float_buffers(network).items():
        buffer.copy_(buffers[f"{ranks.rank}/{name}"])


def load_encoder(checkpoint: Path) -> tuple[I3D, Config, RunState]:
    """The test-time network of a checkpoint: the encoder alone, in evaluation mode.

    Raises:
        UserError: not a checkpoint of ours.
    """
    state = read_state(checkpoint)
    config = config_from_tree(state.config)
    encoder = build_encoder(config.model, len(state.classes))
    prefix = "encoder."
    weights = {
        k.removeprefix(prefix): v for k, v in read_tensors(checkpoint, "weights").items() if k.startswith(prefix)
    }
    encoder.load_state_dict(weights)
    return encoder.eval(), config, state


def load_network(checkpoint: Path) -> tuple[Rev2Net, Config, RunState]:
    """The training-time network of a checkpoint, decoders included, in evaluation mode.

    Raises:
        UserError: not a checkpoint of ours.
    """
    state = read_state(checkpoint)
    config = config_from_tree({**state.config, "model": {**state.config["model"], "imagenet": None}})
    network = build_network(config, len(state.classes))
    load_weights(network, checkpoint)
    return network.eval(), config, state
