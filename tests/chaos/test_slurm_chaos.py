"""What a cluster does to a job, on a real Slurm of two nodes: the time limit, a lost node, preemption after preemption.

Slurm looks at its clocks every half minute, and preempts when it gets to it: the ranks are stopped (SIGSTOP) until its
signal has come, as if a step took that long, so that short trainings do, on fast machines as on slow ones.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from slurm import Slurm, ranks_of
from tiny import TINY

from cluster.cli import main
from cluster.jobs import JobFolder, read_jobs

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

Record = Callable[[str, str, str], None]
_LINE = re.compile(r"(?m)^(\S+ \S+) INFO (?:step (\d+)/\d+ \(|(going on from))")
STEPS, EVERY = 60, 10
"""Of each training, and between two checkpoints of the one that loses a node."""


class Trainings:
    """Trainings on two nodes, one rank on each, in one MLflow store."""

    def __init__(self, slurm: Slurm, data: Path, folder: Path) -> None:
        self.slurm, self._data, self.folder = slurm, data, folder
        self.submit("undisturbed")
        self.finish("undisturbed")

    def submit(self, name: str, *, every: int = STEPS, minutes: int = 20, more: str = "") -> str:
        """Submit a training that saves every `every` steps; its job's number.

        `minutes` is the job's time limit, `more` are further lines of the site file.
        """
        site = self.folder / f"{name}.yaml"
        site.write_text(
            f"partition: low\ntime_minutes: {minutes}\nsignal_delay_s: 30\n"
            f"env: {{OMP_NUM_THREADS: 1, DS_ACCELERATOR: cpu}}\n{more}\n"
        )
        words = ["submit", "configs/demo.yaml", "--nodes", "2", "--tasks-per-node", "1", "--site", str(site)]
        words += ["--folder", str(self.folder / "jobs"), f"data.path={self._data}", f"output={self.folder / name}"]
        words += [*TINY, f"train.duration={STEPS}steps", f"train.checkpoint_every={every}steps"]
        assert main(words) == 0
        return read_jobs(self.folder / "jobs")[-1].job.id

    def text(self, name: str) -> str:
        """The log of a run so far."""
        log = self.folder / name / "train.log"
        return log.read_text() if log.exists() else ""

    def lines(self, name: str) -> list[tuple[datetime, int]]:
        """When each step was done, in the order of the log; step 0 stands for a start that goes on."""
        return [(datetime.fromisoformat(when), int(step or 0)) for when, step, _ in _LINE.findall(self.text(name))]

    def wait_for_step(self, name: str, *, after_starts: int = 0, count: int = 5) -> None:
        """Until the run has done `count` steps since it went on for the last of so many times."""

        def there() -> bool:
            steps = [step for _, step in self.lines(name)]
            starts = [index for index, step in enumerate(steps) if step == 0]
            if len(starts) < after_starts:
                return False
            return len(steps) - (starts[after_starts - 1] + 1 if after_starts else 0) >= count

        self.slurm.wait(f"step of {name}", there, 400)

    def job(self, name: str) -> JobFolder:
        """The job that trains a run."""
        (found,) = (each for each in read_jobs(self.folder / "jobs") if each.job.output == str(self.folder / name))
        return found

    def finish(self, name: str) -> dict[str, str]:
        """Wait for the end of a run's job; what Slurm says of the job then."""
        job = self.job(name).job.id
        self.slurm.wait_for_end(job, 800)
        facts = dict(re.findall(r"(\w+)=(\S+)", self.slurm.command("scontrol", "show", "job", job) or ""))
        assert (self.folder / name / "result.json").exists(), f"{facts}\n{self.text(name)[-3000:]}"
        return facts

    def check(self, name: str, facts: dict[str, str]) -> int:
        """A disturbed run is whole: a start for each of Slurm's, every step, one MLflow run, the undisturbed weights.

        Returns:
            the number of steps that were done twice.
        """
        done = [step for _, step in self.lines(name)]
        assert done.count(0) == int(facts["Restarts"])
        assert set(done) == set(range(STEPS + 1))
        assert self._is_one_mlflow_run(name)
        assert self._equals_the_undisturbed_run(name)
        return len(done) - done.count(0) - STEPS

    def _equals_the_undisturbed_run(self, name: str) -> bool:
        """Whether a run ended with the weights of the one that nobody disturbed."""
        file = f"checkpoints/step-{STEPS:08d}/weights.safetensors"
        one, other = load_file(self.folder / "undisturbed" / file), load_file(self.folder / name / file)
        return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)

    def _is_one_mlflow_run(self, name: str) -> bool:
        """Whether the run is one in MLflow, finished, with each step once."""
        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        runs = client.search_runs(["1"], f"attributes.run_name = '{name}'")
        steps = [metric.step for run in runs for metric in client.get_metric_history(run.info.run_id, "loss/total")]
        return [run.info.status for run in runs] == ["FINISHED"] and len(steps) == len(set(steps))

    def preempt(self, name: str) -> None:
        """A short job of the higher partition takes both nodes."""
        words = ("sbatch", "--parsable", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        with self.slurm.stopped_until_signalled(self.job(name).path):
            other = self.slurm.command(*words)
            assert other
        self.slurm.wait_for_end(other)

    def until_first_step(self, name: str, facts: dict[str, str]) -> str:
        """Seconds from the job's last start to its first step, in words."""
        last = max(index for index, (_, step) in enumerate(self.lines(name)) if step == 0)
        when = self.lines(name)[last + 1][0] - datetime.fromisoformat(facts["StartTime"])
        return f"{when.total_seconds():.0f} s from the restart to its first step"


@pytest.fixture(scope="module")
def trainings(slurm_daemons: Slurm, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm_daemons.conf))
        yield Trainings(slurm_daemons, tiny_data, tmp_path_factory.mktemp("slurm-chaos"))
        slurm_daemons.cancel_all()


def test_p7_a_job_that_reaches_its_time_limit_goes_on_without_a_step_twice(
    trainings: Trainings, record: Record
) -> None:
    trainings.submit("limited", minutes=2)
    trainings.wait_for_step("limited")
    with trainings.slurm.stopped_until_signalled(trainings.job("limited").path):
        pass
    facts = trainings.finish("limited")
    assert trainings.check("limited", facts) == 0 and int(facts["Restarts"]) >= 1
    record(
        "the job reaches its time limit",
        f"saved at the signal, requeued itself, went on in the same MLflow run; the same weights in the end; "
        f"{trainings.until_first_step('limited', facts)}",
        "0 steps",
    )


def test_p4_a_job_whose_node_goes_down_goes_on_from_its_last_checkpoint(trainings: Trainings, record: Record) -> None:
    slurm, job = trainings.slurm, trainings.submit("node", every=EVERY)
    trainings.wait_for_step("node", count=EVERY + 3)
    assert slurm.command("scontrol", "update", "nodename=n2", "state=down", "reason=test") is not None
    try:
        slurm.wait("requeue", lambda: slurm.command("squeue", "-h", "-j", job, "-o", "%T") == "PENDING")
    finally:
        slurm.command("scontrol", "update", "nodename=n2", "state=resume")  # fails where the node is back by itself
    facts = trainings.finish("node")
    lost = trainings.check("node", facts)
    assert facts["Restarts"] == "1" and lost <= EVERY
    record(
        "a node goes down",
        f"Slurm requeued the job; once the node was back it went on in the same MLflow run; "
        f"the same weights in the end; {trainings.until_first_step('node', facts)}",
        f"{lost} steps (a checkpoint every {EVERY})",
    )


def test_p7_a_job_that_is_preempted_twice_does_no_step_twice(trainings: Trainings, record: Record) -> None:
    trainings.submit("preempted")
    for starts in range(2):
        trainings.wait_for_step("preempted", after_starts=starts)
        trainings.preempt("preempted")
    facts = trainings.finish("preempted")
    assert trainings.check("preempted", facts) == 0 and facts["Restarts"] == "2"
    record(
        "a job of a higher partition preempts it, twice",
        f"saved at each signal, requeued, went on in the same MLflow run; the same weights in the end; "
        f"{trainings.until_first_step('preempted', facts)}",
        "0 steps",
    )


def test_p4_a_job_whose_rank_dies_goes_on_from_its_last_checkpoint(trainings: Trainings, record: Record) -> None:
    """As of a GPU that fails. The rank that was started last is killed, once there is a checkpoint."""
    trainings.submit("rank", every=EVERY)
    trainings.wait_for_step("rank", count=EVERY + 3)
    os.kill(int(ranks_of(trainings.job("rank").path)[-1].name), signal.SIGKILL)
    facts = trainings.finish("rank")
    lost = trainings.check("rank", facts)
    assert facts["Restarts"] == "1" and lost <= EVERY
    assert "the training goes on from step-0000" in trainings.job("rank").log(0, "out").read_text()
    record(
        "a rank dies",
        f"the job ended, and its script requeued it, as there was a new checkpoint; the same weights in the end; "
        f"{trainings.until_first_step('rank', facts)}",
        f"{lost} steps (a checkpoint every {EVERY})",
    )


def test_p7_a_job_that_is_preempted_by_sigterm_alone_goes_on(trainings: Trainings, record: Record) -> None:
    """As on sites that do not set `preempt_send_user_signal`."""
    slurm = trainings.slurm
    whole = slurm.conf.read_text()
    slurm.conf.write_text(whole.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
    slurm.command("scontrol", "reconfigure")
    assert "preempt_send" not in (slurm.command("scontrol", "show", "config") or "preempt_send")
    try:
        trainings.submit("terminated")
        trainings.wait_for_step("terminated")
        trainings.preempt("terminated")
        facts = trainings.finish("terminated")
    finally:
        slurm.conf.write_text(whole)
        slurm.command("scontrol", "reconfigure")
    assert trainings.check("terminated", facts) == 0 and facts["Restarts"] == "1"
    assert "by SIGTERM" not in trainings.job("terminated").log(0, "out").read_text()
    record(
        "a job of a higher partition preempts it, announced by SIGTERM alone",
        f"saved at the signal, asked Slurm, requeued itself, went on in the same MLflow run; the same weights; "
        f"{trainings.until_first_step('terminated', facts)}",
        "0 steps",
    )


def test_p7_a_preempted_job_is_requeued_from_outside_its_container(
    trainings: Trainings, tmp_path: Path, record: Record
) -> None:
    """The container is a command that takes Slurm's own commands away from the tasks, as images do."""
    for file in Path("/usr/bin").iterdir():
        if file.name != "scontrol":
            (tmp_path / file.name).symlink_to(file)
    trainings.submit("contained", more=f"container: env PATH={tmp_path}")
    trainings.wait_for_step("contained")
    trainings.preempt("contained")
    facts = trainings.finish("contained")
    assert trainings.check("contained", facts) == 0 and facts["Restarts"] == "1"
    assert "asked the job's script to requeue" in trainings.job("contained").log(0, "out").read_text()
    record(
        "a job in a container is preempted",
        f"saved at the signal, requeued by its script, which runs outside, and went on; "
        f"{trainings.until_first_step('contained', facts)}",
        "0 steps",
    )
