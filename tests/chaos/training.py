"""Real trainings that can be hurt: a process per rank, started as a launcher would, in folders of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file
from tiny import ROOT, TINY, Trained, environment, free_port, rank_environments, wait

from rev2net.losses import TERMS

CONFIG = "configs/demo.yaml"


class Training:
    """A configuration and its output folder, started as often as needed.

    Attributes:
        output: the run's folder.
        pids: of the ranks of the last start, in order of rank.
    """

    def __init__(self, data: Path, output: Path, *words: str, ranks: int = 2) -> None:
        self.output = output
        self.words = (CONFIG, *TINY, f"data.path={data}", f"output={output}", *words)
        self.ranks = ranks
        self._processes: list[subprocess.Popen[bytes]] = []
        self._starts = 0

    def start(self) -> Training:
        """Start all ranks, as torchrun does on one machine."""
        self._starts += 1
        self.output.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rev2net", "train", *self.words]
        self._processes = []
        for rank, env in enumerate(rank_environments(self.ranks)):
            with self._log(rank).open("wb") as log:
                self._processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
                )
        return self

    def launch(self) -> Training:
        """Start two ranks with the `deepspeed` launcher; `end` then gives its status, and `said` what all ranks say."""
        self._starts += 1
        self.ranks = 2
        self.output.parent.mkdir(parents=True, exist_ok=True)
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "rev2net", "train"]
        with self._log(0).open("wb") as log:
            launcher = subprocess.Popen(
                [*command, *self.words], cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
            )
        self._processes = [launcher]
        return self

    def _log(self, rank: int) -> Path:
        return self.output.parent / f"{self.output.name}-{self._starts}-{rank}.log"

    @property
    def pids(self) -> list[int]:
        """Of the ranks, those that a launcher has started included."""
        if self._processes[0].args[0] != "deepspeed":  # type: ignore[index]
            return [process.pid for process in self._processes]
        children = psutil.Process(self._processes[0].pid).children(recursive=True)
        found = {c.environ().get("RANK"): c.pid for c in children if "--module" not in c.cmdline()}
        return [found[str(rank)] for rank in range(self.ranks)]

    def said(self, rank: int = 0) -> str:
        """What a rank has written since it was started."""
        return self._log(rank).read_text()

    def wait_for(self, text: str, seconds: float = 150) -> None:
        """Until rank 0 has written something that this pattern matches."""

        def ready() -> bool:
            if re.search(text, self.said()):
                return True
            assert self._processes[0].poll() is None, f"ended before {text!r}:\n{self.said()[-3000:]}"
            return False

        wait(repr(text), ready, seconds)

    def wait_for_step(self, step: int) -> None:
        """Until a step is done."""
        self.wait_for(rf"step {step}/")

    def kill(self, *ranks: int) -> None:
        """kill -9 of these ranks, or of all."""
        pids = self.pids
        for rank in ranks or range(self.ranks):
            os.kill(pids[rank], signal.SIGKILL)
        for process in self._processes if not ranks else ():
            process.wait()

    def end(self, seconds: float = 240) -> list[int]:
        """Wait for all ranks; their exit statuses. What does not end in time is a failure, and killed."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"hangs after {seconds:.0f} s:\n{self.said()[-3000:]}") from error
        finally:
            self.close()

    def finish(self) -> Training:
        """Wait for all ranks, which must succeed."""
        statuses = self.end()
        assert not any(statuses), f"{statuses}\n{self.said()[-3000:]}"
        return self

    def close(self) -> None:
        """Leave no process behind, a stopped one neither."""
        for process in self._processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()

    def steps_done(self) -> list[int]:
        """Every step that any start has logged, repeated ones included."""
        return [int(step) for step in re.findall(r" step (\d+)/", (self.output / "train.log").read_text())]

    def lost(self) -> int:
        """Steps that were done more than once."""
        done = self.steps_done()
        return len(done) - len(set(done))

    def resumed_from(self) -> int:
        """The step at which the last start went on; 0 where it began anew."""
        found = re.search(r"going on from .* at step (\d+)", self.said())
        return int(found[1]) if found else 0

    def equals(self, other: Training | Trained) -> bool:
        """The same losses at every step, and bit for bit the same weights, statistics and optimizer state."""
        names = [checkpoints(run)[-1] for run in (self, other)]
        assert names[0] == names[1], names
        for file in ("weights", "optimizer", "buffers"):
            mine, theirs = (
                load_file(run.output / "checkpoints" / names[0] / f"{file}.safetensors") for run in (self, other)
            )
            if mine.keys() != theirs.keys() or not all(mine[key].equal(theirs[key]) for key in mine):
                return False
        return history(self) == history(other)


def history(run: Training | Trained) -> dict[str, dict[int, float]]:
    """What MLflow is sent: the value of each loss term at each step."""
    found: dict[str, dict[int, float]] = {term: {} for term in TERMS}
    for line in (run.output / "outbox.jsonl").read_text().splitlines():
        row = json.loads(line)
        for term in TERMS:
            if term in row.get("values", {}):
                assert row["step"] not in found[term], f"{term} of step {row['step']} is sent twice"
                found[term][row["step"]] = row["values"][term]
    return found


def checkpoints(run: Training | Trained) -> list[str]:
    """Names of the checkpoints, oldest first."""
    return sorted(path.name for path in (run.output / "checkpoints").glob("step-*"))
