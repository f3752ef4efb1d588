"""A real Slurm of two nodes on this machine, in a folder of its own: munge, one controller, two node daemons."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiny import free_ports

NODES = ("n1", "n2")
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
# A requeued job waits as long as a credential lives: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser=root
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    absent = [command for command in _COMMANDS if shutil.which(command) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine: apt-get install slurm-wlm munge"
    if os.getuid() != 0:
        return "Slurm's node daemons need root"
    try:
        for node in NODES:
            socket.gethostbyname(node)
    except OSError:
        return "the node names do not resolve: add `127.0.0.1 n1 n2` to /etc/hosts"
    return None


class Slurm:
    """The daemons, while the block lasts. SLURM_CONF must point to `conf` for whoever talks to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = dict(zip(("controller", "first", "second"), free_ports(3), strict=True))
        self.conf.write_text(_CONF.format(host=socket.gethostname(), folder=self.folder, **ports))
        # --force: it complains that others cannot reach its socket, which is as it should be.
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
                    f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
                    f"--seed-file={self.folder}/munge.seed")  # fmt: skip
        self.wait("munge's socket", lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-f", str(self.conf))
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, "-f", str(self.conf))
        self.wait("two idle nodes", lambda: self.command("sinfo", "-h", "-N", "-o", "%T", "-p", "low") == "idle\nidle")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError):  # jobs outlive the daemons
            self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def cancel_all(self) -> None:
        """End whatever runs or waits."""
        self.command("scancel", "--user=root")
        self.wait("empty queue", lambda: self.command("squeue", "-h", "-o", "%i") == "", 60)

    @contextlib.contextmanager
    def stopped_until_signalled(self, folder: Path) -> Iterator[None]:
        """Stop the two ranks of a job; after the block wait until Slurm has signalled both, and let them go on.

        Slurm looks at its clocks every half minute, and preempts when it gets to it: a short training would be over.
        """
        ranks = ranks_of(folder)
        for rank in ranks:
            os.kill(int(rank.name), signal.SIGSTOP)
        try:
            # One that does not stand still yet would look as if Slurm had woken it.
            self.wait("halt", lambda: all(_stands_still((rank / "status").read_text()) for rank in ranks), 60)
            yield
            self.wait("signal", lambda: all(map(_is_signalled, ranks)), 300)
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(rank.name), signal.SIGCONT)

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}-{len(self._daemons)}.out").open("wb") as out:
            self._daemons.append(subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT))

    def command(self, *words: str) -> str | None:
        """What a command of Slurm's says; None where it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        return None if done.returncode else done.stdout.strip()

    def wait(self, what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
        """Poll until `ready`; AssertionError with the daemons' last words otherwise."""
        deadline = time.monotonic() + seconds
        while not ready():
            gone = [str(daemon.args) for daemon in self._daemons if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = "\n".join(f.read_text()[-1500:] for f in self.folder.glob("*.[lo][ou][gt]"))
                raise AssertionError(f"no {what}; ended: {gone}\n{self.command('squeue', '-l')}\n{logs}")
            time.sleep(0.2)

    def wait_for_end(self, job: str, seconds: float = 400) -> None:
        """Until the queue does not hold the job any more."""

        def ended() -> bool:
            queue = self.command("squeue", "-h", "-o", "%A")
            return queue is not None and job not in queue.split()

        self.wait(f"end of job {job}", ended, seconds)


def ranks_of(folder: Path) -> list[Path]:
    """The two ranks of a job, as folders of /proc."""
    path = os.fsencode(folder)
    lines = ((file.parent, file.read_bytes().split(b"\0")) for file in Path("/proc").glob("[0-9]*/cmdline"))
    ranks = [process for process, words in lines if path in words and b"submitit.core._submit" in words[1:4]]
    assert len(ranks) == 2
    return ranks


def _is_signalled(process: Path) -> bool:
    """Whether a signal waits for a process that was stopped, or Slurm has woken it already, with SIGCONT."""
    try:
        status = (process / "status").read_text()
    except OSError:  # woken, saved, and gone
        return True
    pending = re.findall(r"(?m)^(?:SigPnd|ShdPnd):\s(\w+)$", status)
    waits = any(int(mask, 16) >> (s - 1) & 1 for mask in pending for s in (signal.SIGUSR2, signal.SIGTERM))
    return waits or not _stands_still(status)


def _stands_still(status: str) -> bool:
    return "\nState:\tT" in status
