"""What runs on the nodes: one task per rank, and what a signal does to it.

Slurm announces the end of a job by a signal: SIGUSR2 some time before the time limit (and at a preemption where the
site sets a `GraceTime` and `SlurmctldParameters=preempt_send_user_signal`, in later versions
`PreemptParameters=send_user_signal`), SIGTERM at `scancel` and at other preemptions. The
handler only sets a flag. The training loop asks for the flag, agrees on it with all ranks at a step boundary, saves
together with them and returns; only then does rank 0 put the job back into the queue, with submitit's own handler.
submitit by itself would requeue inside the signal handler of rank 0 while the other ranks go on.

After SIGTERM alone the job is saved, and Slurm is asked whether it preempts the job: if so it requeues itself, because
Slurm before 24.05 requeues at the end of the `GraceTime` only, and a job that has ended by then never. A job that its
owner cancelled stays cancelled.

Slurm signals every process of a job step, not ranks only: child processes that training starts must ignore SIGUSR2.

Run so far: with submitit's local executor, and on a real Slurm (22.05) with two nodes and one rank on each: the time
limit, a node that goes down, a rank that dies, preemption by a higher partition, requeues from inside and outside of a
container (a stand-in without scontrol), the same weights in the end. Not yet: several ranks a node, GPUs, a real
container.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from dataloaders.errors import UserError

if TYPE_CHECKING:
    from rev2net.config import Config

StopRequested = Callable[[], bool]
Work = Callable[[StopRequested], bool]
"""Called on every rank with `stop_requested`; True = finished, False = saved and stopped early, on all ranks alike."""

STOPPED = "stopped by SIGTERM: the state is saved, the job does not requeue itself"
"""Last line of rank 0's standard output then."""

PATIENCE_SECONDS = 60.0
"""For Slurm's controller to answer."""

RETRY_SECONDS = 5.0
"""Between two questions."""

FINISHED = "finished"
"""Start of the name of the file by which a job says that its work has come to its end."""

SETTLED = "settled"
"""Start of the name of the file by which a job says that its ranks stopped together, and not because one died."""

SAVED = "saved"
"""Start of the name of the file by which a training says that the next start will find a checkpoint."""

REQUEUE = "requeue"
"""Start of the name of the file by which a task without scontrol asks the job's script to requeue the job."""


class StopFlag:
    """A signal handler that does nothing but remember which signals came."""

    def __init__(self) -> None:
        self.received: set[int] = set()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received.add(signum)

    def raised(self) -> bool:
        """Whether any signal came: `stop_requested` of the training loop."""
        return bool(self.received)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWork:
    """Training of one configuration, which travels with the job: later edits of its file change nothing."""

    config: Config

    def __call__(self, stop_requested: StopRequested) -> bool:
        """Train until the end or until a stop is requested on any rank."""
        from rev2net.checkpoint import latest
        from rev2net.train import train

        log_to_stdout()
        check_gpus()
        folder, saved = Path(self.config.output) / "checkpoints", marker(SAVED)
        if saved.exists() and latest(folder) is None:
            raise UserError(
                f"this job has saved its state, and {socket.gethostname()} sees no checkpoint in {folder}: choose an "
                f"output= on storage that all nodes share (or delete {saved} to train from the start)"
            )
        finished = train(self.config, stop_requested=stop_requested).finished
        if os.environ["RANK"] == "0":
            saved.touch()
        return finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The callable that submitit runs in each process of the job."""

    work: Work

    def __call__(self) -> None:
        """Run the work as one rank of torch.distributed's `env://`; requeue the job when it stopped early.

        Raises:
            SystemExit: stopped early, or a user's mistake, which is one sentence on stderr. No result is written
                then, so that submitit does not take the job for done.
        """
        settle_requeue()
        announced = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        requeue = signal.getsignal(announced)  # submitit's handler, called below when all ranks have saved.
        flag = StopFlag()
        for signum in (announced, signal.SIGTERM):
            signal.signal(signum, flag)
        try:
            rank = export_place()
            finished = self.work(flag.raised)
        except UserError as error:
            sys.exit(f"rev2net-cluster: {error}")
        if finished:
            if rank == 0:
                mark(FINISHED)
            return
        if rank != 0:
            sys.exit(0)  # Not an error code: it would make srun kill rank 0 before it has requeued the job.
        mark(SETTLED)
        if flag.received == {signal.SIGTERM} and not _preempted():
            print(STOPPED, flush=True)
            sys.exit(128 + signal.SIGTERM)
        assert callable(requeue)
        requeue(announced, None)

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook at a requeue: the same task again (the state lies in the run's checkpoints)."""
        return DelayedSubmission(self)


def export_place() -> int:
    """Tell torch.distributed this task's rank, and where all of them meet; the rank.

    Raises:
        UserError: this node does not know the first one by its name.
    """
    given = os.environ.get("MASTER_ADDR")  # by the site's `setup`: of another network, say
    place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if os.environ["SUBMITIT_EXECUTOR"] == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # A laptop's own host name often does not resolve.
        return int(place.rank)
    address = os.environ["MASTER_ADDR"] = given or place.master_addr
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"node {socket.gethostname()} does not know {address}, where the ranks are to meet ({error.strerror}): "
            "`export MASTER_ADDR=...` in the site's setup, with a name of the first node that all of them know"
        ) from None
    if place.local_rank and _sees_one_gpu_of_several():
        os.environ["LOCAL_RANK"] = "0"  # each task has its own as number 0
    return int(place.rank)


def _sees_one_gpu_of_several() -> bool:
    import torch

    return int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) > 1 and torch.cuda.device_count() == 1


def log_to_stdout() -> None:
    """Show what rank 0 has to say, and warnings of all ranks."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    if os.environ["RANK"] == "0":
        for package in ("rev2net", "dataloaders"):
            logging.getLogger(package).setLevel(logging.INFO)


def check_gpus() -> None:
    """UserError where Slurm gave the job GPUs and PyTorch cannot use them: it would train on CPUs without a word."""
    import torch

    given = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_JOB_GPUS")
    if given and os.environ.get("DS_ACCELERATOR") != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"Slurm gave this job GPUs ({given}), but torch {torch.__version__} cannot use them: install one for the "
            "driver of the nodes (`rev2net-cluster doctor --nodes` looks at them), or set DS_ACCELERATOR=cpu"
        )


def settle_requeue() -> None:
    """How the job gets back into the queue: by scontrol, or by its script, as most containers have no scontrol.

    submitit asks scontrol once, and a controller that is busy or changes over would end the training for good.
    """
    if os.environ["SUBMITIT_EXECUTOR"] == "slurm":
        SlurmJobEnvironment._requeue = _requeue if shutil.which("scontrol") else _ask_the_script


def marker(what: str) -> Path:
    """The file WHAT-ID in the job's folder; the id is submitit's."""
    return Path(os.environ["SUBMITIT_FOLDER"]) / f"{what}-{JobEnvironment().job_id}"


def mark(what: str) -> None:
    """Leave the file."""
    marker(what).touch()


def _preempted() -> bool:
    """Whether Slurm takes the nodes from this job, which runs: is neither cancelled nor requeued yet. False where there
    is nobody to ask.
    """
    if os.environ["SUBMITIT_EXECUTOR"] != "slurm" or shutil.which("scontrol") is None:
        return False
    # Not by SLURM_JOB_ID: of one task of an array it is the number of the array, which stands for all of them.
    told = scontrol("show", "job", SlurmJobEnvironment().job_id)
    facts = dict(re.findall(r"\b(JobState|PreemptTime)=(\S+)", told))
    return facts.get("JobState") == "RUNNING" and facts.get("PreemptTime", "None") not in ("None", "Unknown")


def scontrol(*words: str) -> str:
    """Ask Slurm's controller, again and again for `PATIENCE_SECONDS` where it does not answer; what it says.

    Raises:
        SystemExit: it did not.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return subprocess.run(("scontrol", *words), capture_output=True, text=True, check=True, timeout=30).stdout
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip()
        except subprocess.TimeoutExpired:
            said = "no answer"
        if time.monotonic() > deadline:
            sys.exit(
                f"rev2net-cluster: scontrol {' '.join(words)} failed for {PATIENCE_SECONDS:.0f} s ({said}): the state "
                "is saved, the job does not requeue itself: submit it again if it is not in the queue"
            )
        print(f"scontrol {' '.join(words)} failed ({said}), trying again", flush=True)
        time.sleep(RETRY_SECONDS)


def _requeue(environment: Any, countdown: int) -> None:
    scontrol("requeue", environment.job_id)
    print(f"requeued job {environment.job_id} ({countdown} remaining timeouts)", flush=True)


def _ask_the_script(environment: Any, countdown: int) -> None:
    mark(REQUEUE)
    print(f"asked the job's script to requeue the job ({countdown} remaining timeouts)", flush=True)
