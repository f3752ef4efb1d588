"""An output folder has one training at a time; what that may not change when it goes on from a checkpoint."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from dataloaders.errors import UserError
from dataloaders.locks import lock
from dataloaders.shards import DataSet
from rev2net.checkpoint import RunState
from rev2net.config import PLACES, WITHOUT_EFFECT, Config, config_from_tree
from rev2net.distributed import Ranks

log = logging.getLogger("rev2net")

PATIENCE_SECONDS = 120.0
"""For another training to leave the folder: a file server notices late that a machine has died."""

_SIGHT_SECONDS = 65.0
"""For the folder to be seen: a machine may remember for a minute that a file server did not have it."""

_AGAIN_SECONDS = 0.5

_FIXED = (
    "data.holdout",  # it would be tested on clips that it knows, as with the next one
    "data.split",
    "train.seed",
    "train.global_batch",  # the place in the order of samples and in the schedule is counted in it
    "optim.name",  # whose state the checkpoint holds
)
_LEARNED = ("data.", "augment.", "model.", "loss.", "target.", "optim.", "train.micro_batch")


def hold(output: Path, ranks: Ranks, stack: ExitStack) -> None:
    """Make the output folder, and hold it until the stack is closed, or the process ends. A collective.

    Raises:
        UserError: another training does, or not all machines see the folder.
    """
    wrong = ranks.broadcast(_hold(output, stack) if ranks.first else None)
    if wrong is None:
        seen = ranks.gather((socket.gethostname(), _within(_SIGHT_SECONDS, output.is_dir)))
        blind = sorted({host for host, sees in seen if not sees})
        if blind:
            wrong = (
                f"output={output} was made by {seen[0][0]}, and {', '.join(blind)} does not see it: choose a folder on "
                "storage that all machines share"
            )
    if wrong is not None:
        raise UserError(wrong)


def _hold(output: Path, stack: ExitStack) -> str | None:
    """What is wrong, if anything."""
    output.mkdir(parents=True, exist_ok=True)

    def free() -> bool:
        with ExitStack() as attempt:
            if not attempt.enter_context(lock(output / "train", wait=False)):
                return False
            stack.callback(_tidy, output)
            stack.push(attempt.pop_all())
        return True

    try:
        if free():
            return None
        log.warning("another training is at work in %s, waiting %.0f s for its end", output, PATIENCE_SECONDS)
        if _within(PATIENCE_SECONDS, free):
            return None
    except OSError as error:  # a file system without locks
        log.warning("nothing keeps other trainings out of output=%s: %s", output, error.strerror)
        return None
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
        log.warning("nobody leaves %s, which a start of this job has held: its machine has died, going on", output)
        return None
    return (
        f"another training is at work in output={output}: choose another output=, or end that one (if there is none, "
        f"its machine died with a lock on a file server: delete {output / 'train.lock'})"
    )


def _tidy(output: Path) -> None:
    """A training that came to nothing leaves no folder."""
    with suppress(OSError):  # another one begins, or somebody has removed it
        if [file.name for file in output.iterdir()] == ["train.lock"]:
            (output / "train.lock").unlink()
            output.rmdir()


def _within(seconds: float, ready: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN_SECONDS)
    return True


def changes(state: RunState, config: Config) -> Iterator[str]:
    """What is to be told of the settings that differ from those of the checkpoint that a training goes on from."""
    was, now = config_from_tree(state.config).flat(), config.flat()
    changed = [key for key in now if was.get(key) != now[key] and not key.startswith((*WITHOUT_EFFECT, *PLACES))]
    if changed:
        told = ", ".join(f"{key}={now[key]} (it was {was.get(key)})" for key in changed)
        yield f"settings have changed since that checkpoint, and count from here on: {told}"
    if config.init_from is not None and was["init_from"] != now["init_from"]:
        yield f"init_from={config.init_from} is not used: the training has begun, choose another output= for a new one"


def refuse_another_run(
    state: RunState, resumed: Path, config: Config, trained_on: Mapping[str, DataSet], *, complete: bool
) -> None:
    """Refuse to go on as what would be another run.

    Args:
        state: of the checkpoint.
        resumed: where it lies.
        config: what is wanted now.
        trained_on: the data sets that the run learns from, `data` and perhaps `target`.
        complete: no step is left, so that all settings have to be those that the weights are of.

    Raises:
        UserError: other classes or clips, or another setting that cannot change.
    """
    if state.classes != trained_on["data"].classes:
        raise UserError(
            f"{resumed} was trained on {len(state.classes)} classes that are not those of {config.data.path}: "
            "choose another output= or use init_from="
        )
    for name, data in trained_on.items():
        # The order of samples would be that of others, of which some may be for testing now.
        if state.trained_on.get(name, data.fingerprint()) != data.fingerprint():
            raise UserError(
                f"{resumed} was trained on other clips than {data.location} holds now: choose another output=, or set "
                f"{name}.path to the data set as it was to go on"
            )
    was, now = config_from_tree(state.config).flat(), config.flat()
    for key in (*_FIXED, *(f"{name}.train_split" for name in trained_on)):
        if was[key] != now[key]:
            raise UserError(
                f"{resumed} was trained with {key}={was[key]}, not {now[key]}: choose another output=, or set "
                f"{key}={was[key]} to go on"
            )
    for key in now if complete else ():
        if not key.startswith(_LEARNED) or key in PLACES or key.endswith(".val_split"):
            continue
        if was.get(key) != now[key]:
            raise UserError(
                f"{resumed} is the end of a training with {key}={was.get(key)}, not {now[key]}: choose another "
                "output=, or a longer train.duration to go on from it"
            )
