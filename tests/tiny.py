"""What the training tests share: a tiny configuration, and running commands as a user does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

TINY = (
    "data.frames=8",
    "data.size=64",
    "model.width=0.25",
    "train.global_batch=8",
    "train.micro_batch=4",
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
