"""What a training may not change when it goes on from a checkpoint of its output folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dataloaders.errors import UserError
from dataloaders.shards import DataSet
from rev2net.checkpoint import RunState
from rev2net.config import PLACES, Config, config_from_tree

_FIXED = (
    "data.holdout",  # it would be tested on clips that it knows, as with the next one
    "data.split",
    "train.seed",
    "train.global_batch",  # the place in the order of samples and in the schedule is counted in it
    "optim.name",  # whose state the checkpoint holds
)
_LEARNED = ("data.", "augment.", "model.", "loss.", "target.", "optim.", "train.micro_batch")


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
