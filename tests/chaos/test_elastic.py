"""Checkpoints of two ranks go on on one, and those of one on four (a short form is in test_training.py)."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training import Training, history

Record = Callable[[str, str, str], None]

# Dropout and latent noise are on. The order in which gradients are added up differs, by 1e-7 of them; training
# multiplies that, faster the larger the rate and the fewer numbers the last normalisations see (16 here): at ten times
# these rates, in fp32, to 1e-4 after 20 steps, under every ZeRO stage. At these, momenta that are not restored show as
# about 1e-4.
WORDS = (
    *("train.global_batch=8", "train.micro_batch=2", "data.frames=16", "train.duration=28steps"),
    *("train.checkpoint_every=4steps", "train.keep_checkpoints=9", "optim.schedule=constant"),
)
CASES = [
    (f"train.zero_stage={stage}", f"optim.name={name}", f"optim.lr={rate}")
    for stage, (name, rate) in itertools.product((0, 1, 2, 3), (("sgd", "2e-7"), ("adamw", "1e-6")))
]
TOLERANCE = 1e-5


def moved(source: Training, step: int, target: Training) -> Training:
    """The target, with the source's checkpoint of a step to go on from."""
    name = f"checkpoints/step-{step:08d}"
    (target.output / "checkpoints").mkdir(parents=True)
    shutil.copytree(source.output / name, target.output / name)
    return target


def worst(run: Training, other: Training, first: int, last: int) -> float:
    """The largest relative difference of the total loss over steps first to last."""
    mine, theirs = history(run)["loss/total"], history(other)["loss/total"]
    return max(abs(mine[step] / theirs[step] - 1) for step in range(first, last + 1))


@pytest.mark.chaos
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_p5_two_ranks_then_one_then_four_train_the_same(
    case: tuple[str, ...], training: Callable[..., Training], record: Record, tmp_path: Path
) -> None:
    two = training(*WORDS, *case, name="two").start()
    two.wait_for_step(26)  # step 24 has reached the outbox
    two.kill()
    one = moved(two, 4, training(*WORDS, *case, name="one", ranks=1)).start().finish()
    assert one.resumed_from() == 4
    four = moved(one, 8, training(*WORDS, *case, name="four", ranks=4)).start().finish()
    assert four.resumed_from() == 8
    on_one, on_four = worst(one, two, 5, 24), worst(four, one, 9, 28)
    assert max(on_one, on_four) <= TOLERANCE
    words = "ZeRO-" + ", ".join(word.partition("=")[2] for word in case[:2])
    record(
        f"other numbers of ranks: 2, from step 4 on 1, from step 8 on 4 ({words})",
        f"the loss of the next 20 steps differs by at most {on_one:.0e} and {on_four:.0e} of itself",
        "no step",
    )
