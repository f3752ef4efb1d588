"""The configuration: one typed tree, read from YAML and `key=value` overrides.

Unknown keys are errors that name the nearest valid one. What is not given has the default written here.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dataloaders.batch import Stream
from dataloaders.errors import UserError
from dataloaders.plan import Augment, Views
from dataloaders.remote import CACHE_GB
from dataloaders.shards import HELD_OUT
from dataloaders.yaml_file import read_mapping
from rev2net.losses import DDP, KLReduction, Objective, Reduction
from rev2net.models.rev2net import HIDDEN, Skip


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which ~ is the user's home: the shell puts it in at some places only. URLs stay as they are."""


class DataConfig(Section):
    """What to train and evaluate on."""

    path: Place = Field(description="folder made by `rev2net prepare`, or its URL (s3://, gs://, http://, ...)")
    split: int = Field(1, gt=0, description="official split; takes the place of {split} in data.path and output")
    train_split: str = Field("train", description="split to learn from")
    val_split: str = Field("val", description="split to evaluate on")
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of train_split to evaluate on, not train on, in place of val_split"
    )
    frames: int = Field(32, gt=0, description="frames of a clip (T)")
    size: int = Field(224, gt=0, description="height and width of a clip, pixels")
    stride: int = Field(1, gt=0, description="distance of the clip's frames in the stored video")
    segments: int = Field(
        0, ge=0, description="0 = consecutive frames; else equal runs of them from so many parts of the video (TSN)"
    )

    @property
    def eval_split(self) -> str:
        """The split that a training is evaluated on."""
        return HELD_OUT if self.holdout else self.val_split

    @property
    def stack(self) -> int:
        """Consecutive frames that make one image of a network of images: 5 flow frames in TSN, 1 RGB frame."""
        return self.frames // self.segments if self.segments else 1


class AugmentConfig(Section):
    """Training augmentation, drawn on the host for each sample."""

    scales: tuple[float, ...] = Field((1.0, 0.875, 0.75, 0.66), description="side of the crop / short side")
    flip: float = Field(0.5, description="probability of a horizontal flip (0 where left is a class)")
    brightness: float = Field(0.0, description="x = factor from 1 - x to 1 + x, one for the whole clip")
    contrast: float = Field(0.0, description="the same")
    saturation: float = Field(0.0, description="the same")
    hue: float = Field(0.0, description="x = turn by -x to x of the colour circle")


class LoaderConfig(Section):
    """How clips are decoded."""

    backend: Literal["auto", "dali", "pyav"] = Field("auto", description="decoder; auto = dali where it can")
    workers: int = Field(2, gt=0, description="decoding threads of a rank")
    prefetch: int = Field(4, gt=0, description="batches that are decoded and wait, beside those being decoded")
    pipelines_per_gpu: int = Field(1, gt=0, description="DALI pipelines of a rank (one feeds one NVDEC unit)")
    cache: str | None = Field(
        None, description="folder on a disk of this machine for shards of a remote data set; null = in ~/.cache/rev2net"
    )
    cache_gb: float = Field(CACHE_GB, gt=0, description="what that folder may hold, in 10^9 bytes")
    max_bad: float = Field(
        0.01, ge=0, le=1, description="share of the last 1,000 clips that may fail to decode; 4 always may"
    )


NetworkName = Literal["rev2net", "i3d", "tsn", "tsm", "stm", "actionflownet", "off"]


class ModelConfig(Section):
    """The network."""

    # YAML 1.1 reads `off` as false.
    name: Annotated[NetworkName, BeforeValidator(lambda name: "off" if name is False else name)] = Field(
        "rev2net", description="rev2net has the paper's two decoders, actionflownet one of its own"
    )
    input: Stream = Field("rgb", description="what the network sees: frames, or their optical flow")
    width: float = Field(1.0, gt=0, description="factor on the channels of an I3D or 3D ResNet")
    backbone: Literal["resnet18", "resnet50"] = Field("resnet50", description="of tsn, tsm, stm and off")
    partial_bn: bool = Field(
        False, description="of tsn, tsm, stm and off: all batch normalisations but the first keep their statistics"
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="before the classifier")
    flow_decoder: bool = Field(True, description="predict the optical flow in training")
    frame_decoder: bool = Field(True, description="reconstruct the frames in reverse in training")
    decoder_channels: int = Field(HIDDEN, gt=0, description="of the decoders' hidden layers")
    decoder_skip: Skip = Field(
        "both", description="decoders that read the low-level volume, Conv3d_2c, beside their latents"
    )
    latent_noise: bool = Field(True, description="draw the latents in training; false = decode their means")
    imagenet: Place | None = Field(
        None, description="torchvision's ImageNet weights: a file, or auto = the one in torch.hub's cache"
    )
    activation_checkpointing: bool = Field(False, description="compute blocks twice rather than keep activations")
    compile: bool = Field(False, description="torch.compile the network")
    sync_bn: bool = Field(False, description="SyncBatchNorm over the ranks (GPU only)")


class TargetConfig(Section):
    """A data set of another domain with the same classes: tested on, and adapted to without its labels (DANN)."""

    path: Place | None = Field(None, description="folder or URL, as data.path; null = no other domain")
    train_split: str = Field("train", description="its unlabelled clips")
    val_split: str = Field("val", description="its split to test on")
    adapt: bool = Field(True, description="domain-adversarial training; false = train on data.path alone, and test")
    decode: bool = Field(False, description="the decoders learn from its clips too, which they need no labels for")
    weight: float = Field(0.1, ge=0, description="of the domain loss; at 1 a network from scratch learns no labels")
    hidden: int = Field(1024, gt=0, description="width of the domain discriminator")

    @property
    def dann(self) -> bool:
        """Whether there is a domain discriminator."""
        return self.path is not None and self.adapt

    @property
    def trained_on(self) -> bool:
        """Whether its unlabelled clips take part in the training."""
        return self.path is not None and (self.adapt or self.decode)


class LossConfig(Section):
    """Equation 3. See `rev2net.losses.Objective`."""

    ddp: DDP = Field("both", description="penalty on the decoders' disagreement; none where there are not two")
    ddp_low_from: str | int = Field(
        0, description="duration without the low-level penalty, which then grows over as long again"
    )
    fade_from: str | int | None = Field(
        None, description="duration after which alpha, beta and the lambdas fall, to nothing at the end; null = never"
    )
    alpha: float = Field(0.01, ge=0, description="weight of the high-level penalty")
    beta: float = Field(0.1, ge=0, description="weight of the low-level penalty")
    lambda_flow: float = Field(0.1, ge=0, description="weight of the flow's reconstruction")
    lambda_im: float = Field(0.1, ge=0, description="weight of the frames' reconstruction")
    reduction: Reduction = Field("frobenius", description="norm of the reconstructions' errors")
    ddp_low_reduction: Reduction = Field("rms", description="norm of the low-level penalty")
    ddp_high_reduction: KLReduction = Field("sum", description="of the divergences over the latents' elements")

    def objective(self, ddp_low: float = 1.0, auxiliary: float = 1.0) -> Objective:
        """The callable objective, the weights multiplied with `auxiliary`, beta also with `ddp_low`."""
        settings = self.model_dump(exclude={"ddp_low_from", "fade_from"})
        shares = {"alpha": 1.0, "beta": ddp_low, "lambda_flow": 1.0, "lambda_im": 1.0}
        return Objective(**settings | {name: settings[name] * share * auxiliary for name, share in shares.items()})


class OptimConfig(Section):
    """Optimizer and learning rate."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="optimizer")
    lr: float = Field(0.1, gt=0, description="peak learning rate at `lr_batch`")
    lr_batch: int | None = Field(
        None, gt=0, description="batch that `lr` is meant for: scaled linearly; null = as it is"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of adamw"
    )
    weight_decay: float = Field(1e-4, ge=0, description="not on biases and normalisations")
    schedule: Literal["cosine", "wsd", "step", "constant"] = Field(
        "cosine", description="of the rate after the warm-up; wsd = constant, then down to 0 over the last third"
    )
    warmup: str | int = Field(0, description="duration of the linear warm-up")
    milestones: tuple[str | int, ...] = Field((), description="step schedule: when the rate drops")
    gamma: float = Field(0.1, gt=0, description="step schedule: factor of each drop")
    clip_grad_norm: float = Field(0.0, ge=0, description="0 = off")
    decoder_lr: float = Field(1.0, gt=0, description="factor on the rate of what only training has: latents, decoders")


class TrainConfig(Section):
    """The run."""

    global_batch: int = Field(8, gt=0, description="clips of one optimizer step over all ranks")
    micro_batch: int = Field(4, gt=0, description="clips of one forward pass on one rank")
    duration: str | int = Field("1epochs", description="'300steps', '20epochs' or '1e6samples'; a number is steps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of autocast; auto = bf16 where all ranks compute in it, else fp32 (convolutions: TF32 on GPUs)",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed divides over the ranks; 1 = optimizer state")
    channels_last: bool = Field(True, description="memory layout of the clips")
    threads: int | None = Field(None, gt=0, description="CPU threads of a rank; null = cores / ranks of the machine")
    seed: int = Field(0, description="of weights, order, clips and noise")
    log_every: int = Field(10, gt=0, description="steps")
    eval_every: str | int | None = Field(None, description="duration between evaluations; null = at the end only")
    checkpoint_every: str | int = Field("1epochs", description="duration between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="the last so many are kept, and the best")
    hang_minutes: float = Field(
        10.0, ge=0, description="a run in which no rank makes progress for so long is ended; 0 = never"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="more keys of DeepSpeed's own configuration")

    @property
    def possible_ranks(self) -> list[int]:
        """Numbers of ranks that share the global batch in whole micro-batches."""
        micro_batches = self.global_batch // self.micro_batch
        return [ranks for ranks in range(1, micro_batches + 1) if self.global_batch % (self.micro_batch * ranks) == 0]


class EvalConfig(Section):
    """Test protocol."""

    views: str = Field("10x3", description="'CLIPSxCROPS' (10x3, 10x1, 1x1) or 'whole'")
    batch: int = Field(8, gt=0, description="clips of one forward pass")


class ProfileConfig(Section):
    """A torch.profiler trace of some steps of rank 0."""

    steps: str | None = Field(None, description="'20-30'; written to the run's folder")


class TrackingConfig(Section):
    """MLflow."""

    experiment: str = Field("rev2net", description="MLflow experiment")
    run_name: str | None = Field(None, description="null = the output folder's name")
    cell: str | None = Field(None, description="cell of configs/tables.yaml that the run fills, for `rev2net report`")
    uri: str | None = Field(
        None, description="store or server; null = MLFLOW_TRACKING_URI, else mlflow.db beside the output folder"
    )
    enabled: bool = Field(True, description="false = no MLflow")
    parent: str | None = Field(None, description="id of the MLflow run that this one is part of; set by rev2net sweep")


IMAGES = ("tsn", "tsm", "stm", "off")
"""Networks of images, which take frames from all over the video."""

_ONLY_FOR = {
    ("width",): ("rev2net", "i3d", "actionflownet"),
    ("activation_checkpointing",): ("rev2net", "i3d"),
    ("flow_decoder", "frame_decoder"): ("rev2net", "i3d"),  # an i3d has none, whatever they say
    ("decoder_channels", "decoder_skip", "latent_noise"): ("rev2net",),
    ("backbone", "partial_bn"): IMAGES,
}


WITHOUT_EFFECT = (
    *("loader.", "tracking.", "profile.", "eval.batch", "train.threads", "train.log_every", "train.eval_every"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.hang_minutes"),
)
"""Beginnings of keys that no result depends on."""

PLACES = ("output", "data.path", "target.path", "init_from", "model.imagenet")
"""Keys that hold a path on some machine."""


_OURS_FOR_DEEPSPEED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "torch_autocast",
)


class Config(Section):
    """A whole experiment."""

    output: Annotated[Place, AfterValidator(lambda path: path.rstrip("/") or path)] = Field(
        description="folder of the run: log, checkpoints, configuration"
    )
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    target: TargetConfig = TargetConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    profile: ProfileConfig = ProfileConfig()
    tracking: TrackingConfig = TrackingConfig()
    init_from: Place | None = Field(
        None, description="start from these weights, with a replaced head where classes differ"
    )

    @model_validator(mode="after")
    def _check(self) -> Config:
        decoders = self.decoders
        if self.loss.ddp != "none" and len(decoders) < 2:
            raise ValueError(
                f"loss.ddp={self.loss.ddp} compares two decoders, but this model has {len(decoders)}; "
                "set loss.ddp=none or turn on model.flow_decoder and model.frame_decoder"
            )
        if self.target.decode and not decoders:
            raise ValueError(
                f"target.decode=true is for the decoders, but model.name={self.model.name} has none here: "
                "set target.decode=false, or turn a decoder on"
            )
        if self.target.decode and self.target.path is None:
            raise ValueError("target.decode=true has no clips to learn from: give target.path, or set it to false")
        if self.optim.schedule == "step" and not self.optim.milestones:
            raise ValueError("optim.schedule=step has no milestones: give optim.milestones, or set it to constant")
        if self.train.precision == "fp16" and self.train.zero_stage:
            # DeepSpeed 0.19 never lowers its loss scale there: after the first overflow no step is applied any more.
            raise ValueError(
                f"train.precision=fp16 does not work with train.zero_stage={self.train.zero_stage}; use "
                "train.precision=bf16, which needs no loss scale, or train.zero_stage=0"
            )
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch={self.train.global_batch} is not a multiple of "
                f"train.micro_batch={self.train.micro_batch}; change one of them"
            )
        if self.data.size < 32 or self.data.size % 4:
            raise ValueError(f"data.size={self.data.size} must be a multiple of 4 and at least 32")
        if self.model.compile and self.train.zero_stage == 3:
            raise ValueError(
                "model.compile=true does little with train.zero_stage=3, whose hooks break the graph at every module: "
                "use stage 0, 1 or 2"
            )
        self._check_deepspeed()
        self._check_model()
        self._check_durations()
        Augment(**self.augment.model_dump())
        Views.parse(self.eval.views)
        if self.profile.steps is not None:
            parse_range(self.profile.steps, "profile.steps")
        return self

    def _check_deepspeed(self) -> None:
        given = self.train.deepspeed
        for key in _OURS_FOR_DEEPSPEED:
            if key in given:
                raise ValueError(f"train.deepspeed has {key}, which follows from train.*: set it there")
        zero = given.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"train.deepspeed.zero_optimization={zero} is no mapping: see DeepSpeed's documentation")
        if zero.get("stage", self.train.zero_stage) != self.train.zero_stage:
            raise ValueError("train.deepspeed has zero_optimization.stage: set train.zero_stage instead")

    def _check_model(self) -> None:
        model, data = self.model, self.data
        for keys, networks in _ONLY_FOR.items():
            for key in keys:
                given = getattr(model, key)
                if model.name not in networks and given != ModelConfig.model_fields[key].default:
                    raise ValueError(
                        f"model.{key}={given} is for {', '.join(networks)}, but the network is {model.name}: remove it"
                    )
        if model.input == "flow" and model.name in ("rev2net", "actionflownet"):
            raise ValueError(
                f"model.input=flow does not go with model.name={model.name}, which learns to predict the flow: "
                "use model.input=rgb, or model.name=i3d for a flow stream"
            )
        if data.segments and data.frames % data.segments:
            raise ValueError(
                f"data.frames={data.frames} cannot be shared out to data.segments={data.segments}: "
                "give a multiple of the segments"
            )
        if data.segments and self.eval.views == "whole":
            raise ValueError("eval.views=whole takes every frame, but data.segments samples some: use 1x1 or 10x3")
        if model.name in IMAGES:
            if model.name == "off" and data.frames // data.stack < 2:
                raise ValueError(f"model.name=off compares neighbouring images, but data.frames={data.frames} is one")
        elif data.segments:
            raise ValueError(
                f"data.segments={data.segments} is for {', '.join(IMAGES)}, but model.name={model.name} sees motion "
                "in consecutive frames: set data.segments=0"
            )
        elif data.frames % 8:
            raise ValueError(f"data.frames={data.frames} must be a multiple of 8 for model.name={model.name}")

    def _check_durations(self) -> None:
        for field in ("duration", "checkpoint_every", "eval_every"):
            value = getattr(self.train, field)
            if value is not None and parse_duration(value, f"train.{field}")[0] == 0:
                raise ValueError(f"train.{field}={value} is nothing: give at least 1steps")
        for field, value in (("warmup", self.optim.warmup), *(("milestones", m) for m in self.optim.milestones)):
            parse_duration(value, f"optim.{field}")
        parse_duration(self.loss.ddp_low_from, "loss.ddp_low_from")
        if self.loss.fade_from is not None:
            parse_duration(self.loss.fade_from, "loss.fade_from")

    @property
    def decoders(self) -> tuple[str, ...]:
        """The decoders that the network has: some of ("flow", "frame")."""
        if self.model.name == "actionflownet":
            return ("flow",)
        if self.model.name != "rev2net":
            return ()
        return tuple(n for n, on in (("flow", self.model.flow_decoder), ("frame", self.model.frame_decoder)) if on)

    def yaml(self) -> str:
        """The whole tree, defaults included, as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def flat(self) -> dict[str, str]:
        """Dotted names and values, for MLflow's parameters."""
        return {k: str(v) for k, v in _flatten(self.model_dump(mode="json"))}


_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e\+?[0-9]{1,2})?)\s*(steps?|epochs?|samples?)?\s*", re.ASCII)


def parse_duration(text: str | int, name: str) -> tuple[Fraction, str]:
    """('300steps') -> (300, 'step'); the unit is one of step, epoch, sample.

    The amount is exact: 1.1 epochs of 100 samples are 110 samples, which no float says.

    Raises:
        UserError: not a duration.
    """
    match = _DURATION.fullmatch(str(text))
    if match is None:
        raise UserError(f"{name}={text!r} is not a duration: write 300steps, 20epochs or 1e6samples")
    return Fraction(match[1]), (match[2] or "steps").rstrip("s")


def to_steps(text: str | int, name: str, *, global_batch: int, epoch_samples: int) -> int:
    """A duration in optimizer steps, rounded up, at least 0. Epochs count `epoch_samples` samples each."""
    amount, unit = parse_duration(text, name)
    samples = {"step": global_batch, "epoch": epoch_samples, "sample": 1}[unit] * amount
    return math.ceil(samples / global_batch)


def parse_range(text: str, name: str) -> tuple[int, int]:
    """('20-30') -> (20, 30), steps counted from 1.

    Raises:
        UserError: not of the form FIRST-LAST.
    """
    match = re.fullmatch(r"([1-9][0-9]*)-([1-9][0-9]*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"{name}={text!r} is not a range of steps: write FIRST-LAST, such as 20-30")
    return int(match[1]), int(match[2])


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides (`train.seed=1`, values in YAML).

    A file may start from others: `base: ../bases/ucf101.yaml`, or a list of such.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest valid one), a value of another type.
    """
    tree = _read(Path(path))
    for override in overrides:
        _apply(tree, override)
    return config_from_tree(tree)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's tree, laid over those of its `base` (a path beside it, or a list of them, later ones over earlier)."""
    if not path.is_file():
        wanted = f"file {path}, the base of {above[-1]}" if above else f"configuration file {path}"
        raise UserError(f"there is no {wanted}: give the path of a YAML file, such as configs/demo.yaml")
    if path.resolve() in above:
        raise UserError(f"{path} is its own base, through {above[-1]}: remove one `base`")
    tree = read_mapping(path, "a configuration is a mapping of sections")
    bases = tree.pop("base", [])
    if not isinstance(bases, str | list):
        raise UserError(f"{path} has base: {bases}; give a file beside it, a list of them, or no `base`")
    whole: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        whole = laid_over(whole, _read(path.parent / str(base), (*above, path.resolve())))
    return laid_over(whole, tree)


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two trees as one; where both have a value, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """A validated `Config`.

    Raises:
        UserError: the first thing that is wrong, in one sentence.
    """
    try:
        config = Config.model_validate(tree)
        split = str(config.data.split)
        path, output = (text.replace("{split}", split) for text in (config.data.path, config.output))
        return config.model_copy(update={"output": output, "data": config.data.model_copy(update={"path": path})})
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"{override!r} is not an override: write key=value, such as train.seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value of {override!r} is not valid YAML: quote it") from None
    if isinstance(value, str) and re.fullmatch(r"[0-9]+\.?[0-9]*e[+-]?[0-9]+", value):
        value = float(value)  # YAML 1.1 reads 1e-3 as text.
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{key} in {override!r} goes through {parent!r}, which is a value and has no keys")
        node = child
    node[leaf] = value


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    keys = sorted(_known_keys(Config))
    if first["type"] == "extra_forbidden":
        # A key in the wrong section (train.lr) is nearer to its own name elsewhere than to its neighbours.
        namesakes = [key for key in keys if key.rpartition(".")[2] == where.rpartition(".")[2]]
        close = difflib.get_close_matches(where, namesakes or keys, n=1, cutoff=0.0)
        return f"unknown configuration key {where!r}; the nearest valid key is {close[0]!r}"
    if first["type"] == "missing":
        return f"the configuration lacks {where!r}: add it to the file or give {where}=VALUE"
    while where and where not in keys and not where.startswith("train.deepspeed."):
        where = where.rpartition(".")[0]  # pydantic adds the index in a tuple, or the member of a union
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {message}" if where else message


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _known_keys(kind, f"{prefix}{name}.")
        yield prefix + name


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
