"""From a configuration to its data sets and loaders."""

from __future__ import annotations

from dataloaders.errors import UserError
from dataloaders.loader import EvalLoader, TrainLoader
from dataloaders.plan import Augment, ClipShape, Views
from dataloaders.shards import DataSet
from rev2net.config import Config
from rev2net.distributed import Ranks

_TARGET = 0x7A26E7
"""Added to the seed, for the order of the target's clips: two data sets of one size are not paired clip by clip."""


def open_data(config: Config) -> DataSet:
    """The data set, checked against what the configuration wants of it.

    Raises:
        UserError: no such folder or URL, no such split, another official split than data.split, no flow where it is
            learned or seen, too few samples.
    """
    data = open_at(config.data.path, config)
    if config.data.holdout:
        data = data.hold_out(config.data.train_split, config.data.holdout)
    _check_splits(data, config.data.train_split, config.data.eval_split)
    _check_official(data, config, "data.path")
    _check_flow(data, config, learned=True)
    return data


def open_target(config: Config, classes: tuple[str, ...]) -> DataSet | None:
    """The target domain's data set; None where the configuration has none.

    Args:
        classes: the source's.

    Raises:
        UserError: there is no data set, it lacks a split or the flow that decoders want, has other classes, or is of
            another official split than data.split.
    """
    if config.target.path is None:
        return None
    data = open_at(config.target.path, config)
    _check_splits(data, config.target.train_split, config.target.val_split)
    if data.classes != classes:
        odd = a_difference(data.classes, classes)
        raise UserError(
            f"target.path={config.target.path} has {len(data.classes)} classes and data.path={config.data.path} "
            f"{len(classes)}, which differ in {odd!r}: prepare both with the same --class-map"
        )
    _check_official(data, config, "target.path")
    _check_flow(data, config, learned=config.target.decode)
    return data


def a_difference(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    """What to name to somebody whose two lists of classes are not the same: a class that one of them lacks."""
    return min(set(classes) ^ set(others), default="their order")


def open_at(path: str, config: Config) -> DataSet:
    """A data set, unchecked, with the cache that the configuration has for remote ones; errors of `DataSet.open`."""
    return DataSet.open(path, cache=config.loader.cache, cache_gb=config.loader.cache_gb)


def _check_splits(data: DataSet, *splits: str) -> None:
    for split in splits:
        data.shards(split)


def _check_official(data: DataSet, config: Config, key: str) -> None:
    split = (data.official or {}).get("split")
    if split not in (None, config.data.split):
        raise UserError(
            f"{data.location} was prepared from the official split {split}, and data.split is {config.data.split}: set "
            f"data.split={split}, or {key} to the data of split {config.data.split}"
        )


def _check_flow(data: DataSet, config: Config, *, learned: bool) -> None:
    if data.has_flow:
        return
    if config.model.input == "flow":
        raise UserError(
            f"{data.location} was prepared without flow, which model.input=flow needs: prepare it again without "
            "--no-flow, or set model.input=rgb"
        )
    if learned and "flow" in config.decoders:
        instead = "model.flow_decoder=false loss.ddp=none" if config.model.name == "rev2net" else "another model.name"
        raise UserError(
            f"{data.location} was prepared without flow, which the flow decoder of {config.model.name} needs: "
            f"prepare it again without --no-flow, or set {instead}"
        )


def counts(data: DataSet, train_split: str, val_split: str) -> dict[str, str]:
    """What a report of a training says of its data: the manifest's hash as `fingerprint`, the number of `classes`, the
    official `lists` (none, or nothing where that is not known), and of `train` and `val` how many `videos` are used,
    `missing` and `quarantined`. Nothing of a split that the data set lacks, as it may lack `val` beside data.holdout.
    """
    found = {"fingerprint": data.fingerprint(), "classes": str(len(data.classes))}
    if data.official is not None:
        found["lists"] = str(data.official.get("lists", "none"))
    for name, split in (("train", train_split), ("val", val_split)):
        if split not in data.splits:
            continue
        numbers = {"videos": data.num_samples(split), **data.left_out(split)}
        found |= {f"{name}.{kind}": str(number) for kind, number in numbers.items()}
    return found


def clip_shape(config: Config) -> ClipShape:
    """The configured clip."""
    data = config.data
    return ClipShape(frames=data.frames, height=data.size, width=data.size, stride=data.stride, segments=data.segments)


def train_loader(
    data: DataSet, config: Config, ranks: Ranks, start_step: int, *, of_target: bool = False
) -> TrainLoader:
    """This rank's training batches; for the target domain without the flow to predict, unless it is decoded too."""
    sees_flow = config.model.input == "flow"
    return TrainLoader(
        data,
        config.target.train_split if of_target else config.data.train_split,
        shape=clip_shape(config),
        augment=Augment(**config.augment.model_dump()),
        seed=config.train.seed + (_TARGET if of_target else 0),
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        backend=config.loader.backend,
        workers=config.loader.workers,
        prefetch=config.loader.prefetch,
        pipelines_per_gpu=config.loader.pipelines_per_gpu,
        device=ranks.device,
        with_flow=sees_flow or ("flow" in config.decoders and (config.target.decode or not of_target)),
        with_rgb=not sees_flow,
        start_step=start_step,
    )


def eval_loader(
    data: DataSet,
    split: str,
    config: Config,
    ranks: Ranks,
    views: str,
    *,
    for_decoders: bool = False,
    backwards: bool = False,
) -> EvalLoader:
    """This rank's part of a split in the given views, with the decoders' targets where they are wanted."""
    sees_flow = config.model.input == "flow"
    return EvalLoader(
        data,
        split,
        shape=clip_shape(config),
        views=Views.parse(views),
        rank=ranks.rank,
        world_size=ranks.world_size,
        batch_size=config.eval.batch,
        backend=config.loader.backend,
        workers=config.loader.workers,
        prefetch=config.loader.prefetch,
        pipelines_per_gpu=config.loader.pipelines_per_gpu,
        device=ranks.device,
        with_flow=sees_flow or (for_decoders and "flow" in config.decoders),
        with_rgb=not sees_flow,
        backwards=backwards,
    )
