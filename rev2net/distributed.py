"""Joining the process group, whoever launched us: `deepspeed`, torchrun, submitit, or nobody."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataloaders.errors import UserError
from dataloaders.workers import cores

FIRST_STEP_TIMEOUT = timedelta(minutes=30)
"""For collectives: ranks reach the first one at very different times (compilation, cold storage)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among all.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: number of processes.
        local_rank: index on this machine, the index of its GPU.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the rank that writes and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The average of a tensor over all ranks (every rank gets it)."""
        if self.world_size == 1:
            return values
        sums = values.clone()
        dist.all_reduce(sums)
        return sums / self.world_size

    def any(self, flag: bool) -> bool:
        """True on all ranks if it is true on one."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, on every rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's (picklable) value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""What srun and mpirun tell each of the processes that they start: how many they are."""


def read_ranks() -> Ranks:
    """Rank and device from the environment that a launcher made; a process alone is rank 0 of 1.

    Nothing is started: a user's mistake can still be told by rank 0 before any collective.

    Raises:
        UserError: as `own_device`; ranks that are not told where to meet, or tasks that are not told of each other.
    """
    env = os.environ
    tasks = max(int(env.get(name, 1)) for name in _TASKS)
    if tasks > 1 and "WORLD_SIZE" not in env:
        raise UserError(
            f"{tasks} tasks were started that know nothing of each other: start the ranks with rev2net-cluster submit, "
            "deepspeed or torchrun (or set WORLD_SIZE=1, where each is to be a run with an output= of its own)"
        )
    world_size = int(env.get("WORLD_SIZE", "1"))
    untold = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if world_size > 1 and untold:
        raise UserError(
            f"WORLD_SIZE={world_size} is set, but {' and '.join(untold)} is not: start the ranks with deepspeed, "
            "torchrun or rev2net-cluster submit, or unset WORLD_SIZE to use one process"
        )
    device, local_rank = own_device(), int(env.get("LOCAL_RANK", "0"))
    return Ranks(rank=int(env.get("RANK", "0")), world_size=world_size, local_rank=local_rank, device=device)


def own_device() -> torch.device:
    """The GPU of this process's LOCAL_RANK, or the CPU; DS_ACCELERATOR=cpu leaves a machine's GPUs alone.

    Raises:
        UserError: there are more ranks on this machine than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    if 0 < gpus <= local_rank:
        raise UserError(
            f"rank {local_rank} of this machine needs a GPU of its own, and it sees {gpus}: start at most {gpus} here, "
            "or set DS_ACCELERATOR=cpu"
        )
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether it has instructions for bfloat16; others emulate it, a CPU of AVX2 in 20 times the time of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def join(ranks: Ranks, threads: int | None) -> None:
    """Start the process group (NCCL on GPUs, gloo on CPUs) and give this rank its share of the cores.

    Args:
        ranks: what `read_ranks` found.
        threads: CPU threads of a rank; None shares each core among the ranks that may use it.
    """
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
        torch.backends.cudnn.benchmark = True
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    place |= {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": ranks.local_rank}
    alone = "WORLD_SIZE" not in os.environ  # by no launcher: where a shell says to meet is somebody else's
    os.environ.update({name: str(value) for name, value in place.items() if alone or name not in os.environ})
    import deepspeed  # after DS_ACCELERATOR is set: it chooses its accelerator when imported

    if ranks.device.type == "cpu":
        # Else it compiles an all-reduce for inference, which keeps 69 MB of /dev/shm a rank for ever.
        deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=FIRST_STEP_TIMEOUT, verbose=False)
    torch.set_num_threads(threads or fair_threads(ranks.rank, ranks.gather((socket.gethostname(), cores()))))


def limit_collectives(seconds: float) -> None:
    """From now on a collective that takes longer ends its process: the first step, which may, is done."""
    groups = dist.distributed_c10d._world.pg_map  # DeepSpeed has groups of its own
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # of older PyTorch
    for group in groups:
        set_timeout(timedelta(seconds=seconds), group)


def fair_threads(rank: int, cores: Sequence[tuple[str, Collection[int]]]) -> int:
    """Threads for a rank: a core counts for the ranks that may run on it in equal parts.

    SLURM may bind every task to cores of its own; elsewhere all ranks of a machine see all of its cores.

    Args:
        rank: whose threads.
        cores: for every rank its machine and the cores that it may use.
    """
    host, mine = cores[rank]
    share = sum(Fraction(1, sum(core in theirs for where, theirs in cores if where == host)) for core in mine)
    return max(1, int(share))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
