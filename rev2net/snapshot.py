"""What a checkpoint holds of a running training: whole tensors out of the engine, and back into it.

Every tensor is whole and bears its parameter's name, so that the number of ranks and the ZeRO stage may change. Live
batch-normalisation statistics are only read: the averages over the ranks go into the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rev2net.distributed import Ranks
from rev2net.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Copies in host memory, which training does not touch any more.

    Attributes:
        weights: parameters, and batch-normalisation statistics averaged over the ranks.
        optimizer: whole states as `parameter/state`.
        buffers: the ranks' own statistics, [ranks, ...] each: few tensors, as files of many are slow.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


def take(engine: Engine) -> Snapshot | None:
    """The state between two steps, on rank 0; None elsewhere. A collective."""
    first = engine.ranks.first
    buffers = _all_buffers(engine)
    weights = {name: _on_host(whole) for name, whole in _whole_weights(engine, buffers) if first}
    optimizer = {name: _on_host(whole) for name, whole in _whole_optimizer(engine) if first}
    if not first:
        return None
    own = {name: _on_host(parts) for name, parts in buffers.items()}
    return Snapshot(weights=weights, optimizer=optimizer, buffers=own)


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """Whole parameters and averaged statistics, on every rank's host memory. A collective."""
    return {name: _on_host(whole) for name, whole in _whole_weights(engine, _all_buffers(engine))}


def _on_host(whole: Tensor) -> Tensor:
    return whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _whole_weights(engine: Engine, buffers: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param

    network = engine.step_module.network
    for name, parameter in network.named_parameters():
        whole = parameter if engine.config.train.zero_stage < 3 else safe_get_full_fp32_param(parameter)
        assert whole is not None
        yield name, whole
    for name, buffer in _buffers(network).items():
        yield name, buffers[name].mean(0) if name in buffers else buffer


def _whole_optimizer(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    for name, parameter in engine.step_module.network.named_parameters():
        for key in engine.state_names:
            if engine.config.train.zero_stage == 0:
                yield f"{name}/{key}", engine.torch_optimizer.state[parameter][key]
            else:
                yield f"{name}/{key}", safe_get_full_optimizer_state(parameter, key)


def _all_buffers(engine: Engine) -> dict[str, Tensor]:
    """The ranks' statistics, [ranks, ...] each, on every rank, by one collective."""
    buffers = _float_buffers(engine.step_module.network)
    flat = torch.cat([b.flatten() for b in buffers.values()])
    whole = flat.new_empty(engine.ranks.world_size, len(flat))
    if engine.ranks.world_size > 1:
        dist.all_gather(list(whole), flat)
    else:
        whole[0] = flat
    parts = torch.split(whole, [b.numel() for b in buffers.values()], dim=1)
    return {name: part.reshape(-1, *b.shape) for (name, b), part in zip(buffers.items(), parts, strict=True)}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those that a checkpoint holds; constants are made anew with the network."""
    kept = module.state_dict().keys()
    return {name: b for name, b in module.named_buffers() if name in kept}


def _float_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in _buffers(module).items() if b.is_floating_point()}


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


def restore_buffers(network: nn.Module, buffers: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Put this rank's own statistics back, where the checkpoint was written on the same number of ranks."""
    for name, buffer in _float_buffers(network).items():
        older = f"{ranks.rank}/{name}"  # of checkpoints that kept a tensor for each rank
        buffer.copy_(buffers[name][ranks.rank] if older not in buffers else buffers[older])
