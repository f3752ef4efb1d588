"""The doctor on the nodes of a Slurm job: what each of them has, and an all-reduce over all ranks.

Run so far on a real Slurm with two nodes and gloo; NCCL follows the same code but has not been seen on it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from submitit.core.job_environment import JobEnvironment

from cluster.doctor import Row, bandwidths, describe, diagnose, line_of
from cluster.jobs import Job, JobFolder, new_folder, now, record
from cluster.site import Site
from cluster.status import cancel, read_statuses
from cluster.submit import Placement, submit_slurm
from cluster.task import export_place
from dataloaders.errors import UserError
from dataloaders.shards import write_atomically

_NAME = "rev2net-doctor"
_MINUTES = 10
_MEETING = timedelta(minutes=3)
"""For the ranks to meet: packages that come from a cold network disk take long to import."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorTask:
    """The callable of each rank. Rows go to files of the job's folder, as far as it comes.

    Attributes:
        folder: the job's.
        storage: folder whose files each node reads, or None.
    """

    folder: Path
    storage: Path | None

    def __call__(self) -> None:
        """The first rank of a node looks at the node; then all ranks reduce."""
        rank, first_of_node = export_place(), JobEnvironment().local_rank == 0
        if first_of_node:
            self._write(f"node-{rank}", self._look())
        row = _all_reduce(rank, int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))
        if rank == 0 or row.state == "FAIL":
            self._write(f"all-reduce-{rank}", [row])

    def _look(self) -> list[Row]:
        try:
            return list(diagnose(processes=None, storage=self.storage))
        except UserError as error:  # a folder that this node does not see
            return [*diagnose(processes=None, storage=None), Row(name="storage", state="FAIL", text=str(error))]

    def _write(self, name: str, rows: list[Row]) -> None:
        tree = {"node": os.environ["SLURMD_NODENAME"], "rows": [asdict(row) for row in rows]}
        write_atomically(self.folder / f"{name}.json", json.dumps(tree).encode())


def diagnose_nodes(*, placement: Placement, site: Site, storage: Path | None, parent: Path) -> Iterator[Row]:
    """Submit the job, wait until it has ended, and tell its rows; rows that all nodes share are told once.

    Args:
        placement: nodes, and ranks on each.
        site: settings of the cluster; the time limit is ten minutes.
        storage: folder whose files are read on each node, or None.
        parent: where the job's folder is made.

    Raises:
        UserError: `sbatch` refuses the job.
        RuntimeError: Slurm does not answer.
    """
    site = site.model_copy(update={"time_minutes": _MINUTES, "signal_delay_s": 60})
    with new_folder(parent, _NAME) as folder:
        task = DoctorTask(folder=folder, storage=None if storage is None else storage.absolute())
        submitted = submit_slurm(task, placement=placement, site=site, folder=folder, name=_NAME)
        job = Job(
            ids=(submitted.job_id,),
            ranks=placement.tasks,
            kind="doctor",
            name=_NAME,
            output=str(folder),
            executor="slurm",
            submitted=now(),
        )
        record(folder, job)
    print(f"job {job.id}: {placement.nodes} x {placement.tasks_per_node} tasks, logs in {folder}", flush=True)
    each = JobFolder(folder, job)
    try:
        while (status := read_statuses([each])[0]).alive:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        cancel([each], [each])
        sys.exit(f"job {job.id} is cancelled")
    yield from _node_rows(folder, placement.nodes)
    yield from _reduce_rows(folder, f"the job ended before: {status.detail}")


def _node_rows(folder: Path, nodes: int) -> Iterator[Row]:
    told: dict[str, dict[tuple[str, str], list[str]]] = {}
    found = [json.loads(file.read_bytes()) for file in folder.glob("node-*.json")]
    for tree in sorted(found, key=lambda tree: str(tree["node"])):
        for row in tree["rows"]:
            told.setdefault(row["name"], {}).setdefault((row["state"], row["text"]), []).append(tree["node"])
    for name, variants in told.items():
        for (state, text), where in variants.items():
            place = f"all {nodes} nodes" if len(where) == nodes else ", ".join(where)
            yield Row(name=name, state=state, text=f"{text} ({place})")  # type: ignore[arg-type]
    if len(found) < nodes:
        yield Row(name="nodes", state="FAIL", text=f"{nodes - len(found)} of {nodes} told nothing: see {folder}")


def _reduce_rows(folder: Path, otherwise: str) -> Iterator[Row]:
    trees = [json.loads(file.read_bytes()) for file in sorted(folder.glob("all-reduce-*.json"))]
    rows = [Row(**row) for tree in trees for row in tree["rows"]]
    failed = [row for row in rows if row.state == "FAIL"]
    if failed or not rows:
        text = f"{failed[0].text} ({len(failed)} ranks failed)" if failed else otherwise
        yield Row(name="all-reduce", state="FAIL", text=f"{text}; see {folder}")
    else:
        yield rows[0]


def _all_reduce(rank: int, local_rank: int, world_size: int) -> Row:
    import torch
    from torch import distributed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    name = f"all-reduce, {world_size} x {backend}"
    try:
        distributed.init_process_group(backend, timeout=_MEETING)
        rates = bandwidths(torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu"))
        distributed.destroy_process_group()
    except Exception as error:
        return Row(name=name, state="FAIL", text=f"rank {rank} on {socket.gethostname()}: {line_of(error)}")
    return Row(name=name, state="ok", text=describe(rates))
