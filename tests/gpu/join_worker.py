"""Run under torchrun: every collective that training uses, over all ranks of the machine."""

from __future__ import annotations

import torch
import torch.distributed as dist

from rev2net.distributed import join, read_ranks

ranks = read_ranks()
join(ranks, None)
mean = ranks.mean(torch.full((1 << 20,), float(ranks.rank), device=ranks.device))
assert bool((mean == (ranks.world_size - 1) / 2).all()), mean
assert ranks.gather(ranks.rank) == list(range(ranks.world_size))
assert ranks.broadcast(f"from {ranks.rank}") == "from 0"
assert ranks.any(ranks.rank == ranks.world_size - 1) and not ranks.any(False)
ranks.barrier()
print(f"joined {ranks.rank} by {dist.get_backend()} on {ranks.device}")
dist.destroy_process_group()
