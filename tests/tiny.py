"""What the training tests share: a tiny configuration, and running commands as a user does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataloaders.shards import DataSet, ShardReader

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

TINY = (
    "data.frames=8",
    "data.size=64",
    "model.width=0.25",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.threads=1",
    "train.log_every=1",
    "train.duration=6steps",
    "train.checkpoint_every=3steps",
    "optim.warmup=0",
    "loss.ddp_low_from=2steps",
    "loader.workers=1",
    "eval.views=1x1",
)


def environment() -> dict[str, str]:
    """The environment of a child process: this interpreter's commands first, one thread, no GPU."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["PYTHONPATH"] = str(ROOT / "tests")  # for the scripts that the tests start
    env.pop("MLFLOW_TRACKING_URI", None)
    return env


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now, each another one."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The environments of as many processes as torchrun gives them, for one start."""
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_until_first_ends(*command: str) -> tuple[int, str, int]:
    """Two ranks of a command that gets stuck on the second; the first one's status and words, and the other's pid."""
    first, second = (
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for env in rank_environments(2)
    )
    try:
        said, _ = first.communicate(timeout=120)
    finally:
        second.kill()
        second.communicate()
    return first.returncode, said, second.pid


def wait(what: str, ready: Callable[[], object], seconds: float = 150) -> None:
    """Poll until `ready`."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.01)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so much memory ("1m") at a new folder; skips where it cannot be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def spoil(data: Path, clips: int) -> None:
    """Zeros in place of the videos of the first so many training clips, which have flow."""
    left = clips
    for shard in DataSet.open(data).shards("train"):
        with ShardReader(shard.path) as reader, shard.path.open("r+b") as tar:
            for name, offset, size in reader.components()[: 3 * left]:
                if name.endswith(".mp4"):
                    tar.seek(offset)
                    tar.write(bytes(size))
            left -= min(left, len(reader))


def run(*command: str, expect: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command and check its exit status, showing its output where that is another one."""
    if command[0] == "deepspeed":  # its default port is taken where two trainings run at once
        command = (command[0], "--master_port", str(free_port()), *command[1:])
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == expect, f"{command} gave {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@dataclass(frozen=True)
class Trained:
    """A finished training: its output folder, its standard output, and the arguments that made it."""

    output: Path
    stdout: str
    command: tuple[str, ...]
