"""Trainings killed with -9, and what they do when they are started again. The long forms run under `make chaos`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from tiny import Trained, wait
from training import Training, checkpoints

from rev2net.distributed import computes_in_bf16

Record = Callable[[str, str, str], None]

STEPS = ("train.duration=8steps", "train.checkpoint_every=3steps")
# All 16 combinations are resumed in test_training.py::test_p4_p5_...; these are killed.
SHORT: tuple[str, ...] = ()
"""The configuration as it is: ZeRO-1, AdamW."""

BF16 = "bf16" if computes_in_bf16(torch.device("cpu")) else "fp32"
"""Emulated it takes minutes for what these trainings do in seconds."""

CASES = [
    SHORT,
    *(
        (f"train.zero_stage={stage}", f"optim.name={name}", f"train.precision={precision}", "optim.lr=1e-3")
        for stage, name, precision in (
            (0, "sgd", BF16),
            (2, "adamw", "fp32"),
            (3, "sgd", "fp32"),
            (3, "adamw", BF16),
        )
    ),
]


@pytest.mark.parametrize(
    "case",
    [case if case == SHORT else pytest.param(case, marks=pytest.mark.chaos) for case in CASES],
    ids=lambda case: " ".join(case) or "default",
)
def test_p4_after_kill_9_of_all_ranks_the_losses_and_weights_are_the_undisturbed_ones(
    case: tuple[str, ...],
    training: Callable[..., Training],
    undisturbed: Callable[..., Training],
    trained: Trained,
    record: Record,
) -> None:
    run = training(*case).start()  # 6 steps; an epoch is two of them, so that step 3 lies inside of one
    run.wait_for_step(4)
    wait("the checkpoint", lambda: "step-00000003" in checkpoints(run))
    run.kill()
    begin = time.monotonic()
    run.start()
    run.wait_for("going on from")
    ready = time.monotonic() - begin
    run.wait_for(r"step \d+/")
    first = time.monotonic() - begin
    run.finish()
    assert run.resumed_from() == 3
    assert run.equals(trained if case == SHORT else undisturbed(*case))
    words = "ZeRO-" + (", ".join(word.partition("=")[2] for word in case[:3]) or "1, adamw")
    record(
        f"kill -9 of all ranks ({words})",
        f"the same command goes on from step 3 in the same run; {ready:.0f} s to the checkpoint, {first:.0f} s to the "
        "first step; losses and final weights bit-equal to the undisturbed run's",
        f"{run.lost()} steps (of an interval of 3)",
    )


@pytest.mark.chaos
def test_p4_ten_kills_at_random_moments_change_nothing(
    training: Callable[..., Training], undisturbed: Callable[..., Training], record: Record
) -> None:
    words = ("train.duration=60steps", "train.checkpoint_every=1steps", "train.eval_every=10steps")
    run = training(*words)
    draw = random.Random(0)
    kills = 0
    while kills < 10:
        run.start()
        moment = time.monotonic() + draw.uniform(2, 14)
        wait("the moment", lambda moment=moment: time.monotonic() > moment)
        if (run.output / "result.json").exists():
            break
        run.kill()
        kills += 1
    run.start().finish()
    assert kills >= 5 and run.equals(undisturbed(*words))
    record(
        "kill -9 of all ranks at random moments of start, steps, saving and evaluation",
        f"{kills} kills of one run: finished in the same run, bit-equal to the undisturbed one",
        f"{run.lost()} steps in all, with a checkpoint at every step",
    )


@pytest.mark.chaos
def test_p4_kill_9_during_evaluation_does_the_evaluation_again(
    training: Callable[..., Training], undisturbed: Callable[..., Training], record: Record
) -> None:
    words = ("train.duration=6steps", "train.eval_every=3steps", "eval.views=10x3")
    run = training(*words).start()
    run.wait_for(r"step 3/")
    wait("the checkpoint", lambda: "step-00000003" in checkpoints(run))
    run.kill()
    evaluated = (run.output / "checkpoints" / "step-00000003" / "evaluation.json").exists()
    run.start().finish()
    assert not evaluated and run.resumed_from() == 3 and "step 3, validation" in run.said()
    assert run.equals(undisturbed(*words)) and run.lost() == 0
    record("kill -9 of all ranks during an evaluation", "goes on with that evaluation", "no step")


@pytest.mark.chaos
def test_p10_kill_9_of_one_rank_ends_the_job_and_the_same_command_goes_on(
    training: Callable[..., Training], undisturbed: Callable[..., Training], record: Record
) -> None:
    run = training(*STEPS).launch()
    run.wait_for_step(5)
    begin = time.monotonic()
    run.kill(1)
    (status,) = run.end(120)
    took = time.monotonic() - begin
    assert status != 0
    run.start().finish()
    assert run.equals(undisturbed(*STEPS))
    record(
        "kill -9 of one rank under the `deepspeed` launcher",
        f"the job ends with status {status} after {took:.0f} s; the same command goes on from step 3",
        f"{run.lost()} steps (of an interval of 3)",
    )


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.chaos)])
def test_p6_kills_during_saving_leave_the_checkpoint_before(
    kills: int, training: Callable[..., Training], record: Record
) -> None:
    """A checkpoint is begun after every second step, and the training is killed while one is being written."""
    interval, draw = 2, random.Random(1)
    run = training(
        f"train.checkpoint_every={interval}steps", "train.duration=100000steps", "tracking.enabled=false", ranks=1
    )
    folder = run.output / "checkpoints"
    partial, worst = 0, 0
    begun = killed = 0
    while killed < kills or not partial:  # a kill that comes after the last file shows nothing
        assert killed < kills + 20, "no kill came in the middle of a checkpoint"
        run.start()
        # What is half written from the time before is removed before the first step.
        run.wait_for(r"step \d+/")
        assert run.resumed_from() >= begun - interval
        worst = max(worst, begun - run.resumed_from())
        wait("a save", lambda: any(folder.glob(".step-*.partial")), 60)
        time.sleep(draw.uniform(0, 0.1) if killed else 0)
        run.kill()
        killed += 1
        partial += any(folder.glob(".step-*.partial"))
        done = max(run.steps_done())
        begun = (done - 1) // interval * interval  # a step after it is done, so the one before it was waited for
    run.start()
    run.wait_for(r"step \d+/")
    assert run.resumed_from() >= begun - interval
    record(
        f"kill -9 while a checkpoint is being written, {killed} times",
        f"{partial} times a half-written folder was left, which the next start removed; no damaged checkpoint",
        f"at most {max(worst, begun - run.resumed_from())} steps before the checkpoint that was begun (of an interval "
        f"of {interval}), and the steps done while it was written",
    )
