"""The DeepSpeed engine: network and objective as one module, ZeRO and precision from the configuration."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dataloaders.batch import ClipBatch
from dataloaders.errors import UserError
from dataloaders.keyed import hash64
from rev2net.config import Config, laid_over
from rev2net.distributed import Ranks, computes_in_bf16
from rev2net.losses import Objective
from rev2net.models.dann import domain_loss
from rev2net.models.heads import Network
from rev2net.optim import build_optimizer

log = logging.getLogger("rev2net")


class TrainingStep(nn.Module):
    """Network and objective as the one module that DeepSpeed drives. Returns named scalars: the losses, accuracy.

    Attributes:
        objective: replaced where a weight changes during the run.
        domain_weight: of the domain loss in the total.
        reversal: factor of the reversed gradient (DANN); replaced before each step.
    """

    def __init__(self, network: Network, objective: Objective, domain_weight: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.domain_weight = domain_weight
        self.reversal = 0.0

    def forward(
        self,
        clip: Tensor,
        flow: Tensor | None,
        label: Tensor,
        generator: torch.Generator,
        *,
        decode_all: bool = False,
    ) -> dict[str, Tensor]:
        """One micro-batch: the stream that the network sees, M C T H W, the flow to predict, N labels.

        Dropout and latent noise come from `generator`. Clips of the target domain, which have no labels, stand behind
        those that have: they share the forward pass, hence the batch statistics. The domain loss sees them, and with
        `decode_all` the decoders do; `flow` is that of the clips that are decoded.
        """
        labelled = len(label)
        output = self.network.heads(clip, generator, labelled, decode_all=decode_all)
        scalars = self.objective(output, label, clip if decode_all else clip[:labelled], flow)
        scalars["train/top1"] = (output.logits.detach().argmax(1) == label).float().mean()
        if self.network.discriminator is None:
            return scalars
        domains = self.network.discriminator(output.pooled, self.reversal)
        scalars["loss/domain"], scalars["domain/accuracy"] = domain_loss(domains, labelled)
        scalars["loss/total"] = scalars["loss/total"] + self.domain_weight * scalars["loss/domain"]
        return scalars


def micro_batches(config: Config, ranks: Ranks) -> int:
    """Micro-batches that a rank accumulates for one optimizer step.

    Raises:
        UserError: the ranks cannot divide the global batch.
    """
    micro, total = config.train.micro_batch, config.train.global_batch
    if total % (micro * ranks.world_size):
        possible = ", ".join(map(str, config.train.possible_ranks))
        raise UserError(
            f"train.global_batch={total} cannot be divided into micro-batches of {micro} on {ranks.world_size} ranks; "
            f"with these batches {possible} ranks are possible: change the number of ranks, "
            "train.global_batch or train.micro_batch"
        )
    return total // (micro * ranks.world_size)


def settle_precision(config: Config, ranks: Ranks) -> Config:
    """The same with bf16 or fp32 in place of `train.precision=auto`, on all ranks alike. A collective."""
    emulated = ranks.any(not computes_in_bf16(ranks.device))
    train = config.train
    if train.precision == "bf16" and emulated and ranks.first:
        log.warning(
            "train.precision=bf16 is emulated on this %s, which can take 20 times as long as fp32: "
            "train.precision=auto takes what its devices compute in",
            ranks.device.type,
        )
    if train.precision != "auto":
        return config
    settled = train.model_copy(update={"precision": "fp32" if emulated else "bf16"})
    return config.model_copy(update={"train": settled})


def deepspeed_config(config: Config, ranks: Ranks, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; keys under `train.deepspeed` are added last. Its precision is settled.

    Parameters stay float32 (`torch_autocast`, not `bf16`/`fp16`, which would cast batch normalisation), and so do
    gradients on the wire (`lower_precision_safe_modules: []`), so that the number of ranks does not change them.

    Args:
        parameters: of the network; gradients are reduced in one bucket of that size, where DeepSpeed's own takes 2 GB.
    """
    train = config.train
    tree: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": micro_batches(config, ranks),
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": parameters},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.optim.clip_grad_norm,
        "steps_per_print": 10**9,
        # The timer waits for the GPU before each forward pass, for what is not shown.
        "timers": {"throughput": {"enabled": False}},
    }
    if train.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[train.precision]
        tree["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return laid_over(tree, train.deepspeed)


def conv3d_warning(torch_version: str, cudnn: int | None) -> str | None:
    """What is known to be wrong with 3-D convolutions in this pair of versions (pytorch #163539, #166643).

    Args:
        torch_version: such as "2.9.1+cu128".
        cudnn: as `torch.backends.cudnn.version()` gives it (91002 is 9.10.2), None without cuDNN.
    """
    if cudnn is None:
        return None
    if torch_version.split("+")[0] in ("2.9.0", "2.9.1") and cudnn < 91500:
        return f"torch {torch_version} with cuDNN {cudnn}: bf16 conv3d takes up to 3x the memory; install cuDNN >= 9.15"
    if 90800 <= cudnn < 91100:
        return f"cuDNN {cudnn}: bf16 conv3d gives wrong results with 9.8-9.10; install cuDNN >= 9.15"
    return None


@dataclass(slots=True)
class Engine:
    """A thin, typed face over `deepspeed.DeepSpeedEngine`.

    Attributes:
        deepspeed: the wrapped engine.
        step_module: the module that it drives.
        accumulation: micro-batches of one optimizer step on this rank.
        config: the run's configuration.
        ranks: this process's place.
        statistics: this rank's batch-normalisation statistics as they were before the step.
        overflowed: fp16's scaler dropped the last step, for gradients that its scale made infinite.
    """

    deepspeed: Any
    step_module: TrainingStep
    accumulation: int
    config: Config
    ranks: Ranks
    statistics: dict[str, Tensor] = field(default_factory=dict)
    overflowed: bool = False

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's; under ZeRO its parameters are flat partitions."""
        optimizer = self.deepspeed.optimizer
        inner: torch.optim.Optimizer = optimizer if self.config.train.zero_stage == 0 else optimizer.optimizer
        return inner

    @property
    def optimizer_bytes(self) -> int:
        """What this rank holds of the optimizer's state, without its count of steps, which is on the host."""
        return sum(state[name].nbytes for state in self.torch_optimizer.state.values() for name in self.state_names)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the optimizer's tensors for each parameter."""
        return ("momentum_buffer",) if self.config.optim.name == "sgd" else ("exp_avg", "exp_avg_sq")

    def create_optimizer_state(self) -> None:
        """Make the optimizer's tensors now (zeros) and not at the first step, so that they can be restored."""
        if self.config.train.zero_stage == 3:  # its groups are empty between steps
            parameters = list(self.deepspeed.optimizer.fp32_partitioned_groups_flat)
        else:
            parameters = [p for group in self.torch_optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            state = self.torch_optimizer.state[parameter]
            for name in self.state_names:
                state[name] = torch.zeros_like(parameter.data)
            if self.config.optim.name == "adamw":
                state["step"] = torch.tensor(0.0)
        if self.config.train.zero_stage in (1, 2):
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def forward_backward(
        self, step: int, index: int, batch: ClipBatch, target: ClipBatch | None = None
    ) -> dict[str, Tensor]:
        """Forward and backward pass of this rank's micro-batch number `index` of `step`; detached scalars.

        `target` is the micro-batch of the target domain that is paired with it.

        Whatever is random on the device is drawn from (seed, step, number of the micro-batch in the global
        batch): the same on every number of ranks, and nothing to save.
        """
        if index == 0:
            self.statistics = {name: b.clone() for name, b in self.step_module.network.named_buffers()}
        number = self.ranks.rank * self.accumulation + index
        seed = hash64(self.config.train.seed, step, number) % 2**63
        generator = torch.Generator(self.ranks.device).manual_seed(seed)
        stream = self.config.model.input
        clip, flow = batch.stream(stream), batch.flow if "flow" in self.config.decoders else None
        decode_all = target is not None and self.config.target.decode
        if target is not None:
            clip = torch.cat([clip, target.stream(stream)])
            if decode_all and flow is not None:
                assert target.flow is not None
                flow = torch.cat([flow, target.flow])
        scalars = self.deepspeed(clip, flow, batch.label, generator, decode_all=decode_all)
        self.deepspeed.backward(scalars["loss/total"])
        return {name: value.detach() for name, value in scalars.items()}

    @property
    def updates(self) -> int:
        """Updates that AdamW has made (SGD does not count them: 0)."""
        return max((int(s["step"]) for s in self.torch_optimizer.state.values() if "step" in s), default=0)

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of the scaler of the loss under fp16; None where there is none."""
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        return None if scaler is None else dict(scaler.state_dict())

    def restore_loss_scale(self, state: dict[str, float] | None) -> None:
        """Put back what `loss_scale` gave, if there is a scaler now."""
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        if scaler is not None and state is not None:
            scaler.load_state_dict(state)

    def micro_step(self) -> None:
        """After each `forward_backward` but the last of a step: DeepSpeed counts it."""
        self.deepspeed.step()

    def finish_step(self) -> bool:
        """After the last `forward_backward`: the optimizer's step. On every rank.

        Returns:
            False where gradients are not finite, on all ranks alike: the step is skipped, as in `skip_step`. Under
            fp16 an overflow is the scaler's business, and no such case while its scale is above 1: see `overflowed`.
        """
        if self.config.train.zero_stage == 0 and self.config.train.precision != "fp16":
            # DeepSpeed looks at the gradients itself from stage 1 on.
            gradients = [p.grad for p in self.step_module.network.parameters() if p.grad is not None]
            if not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
                self.skip_step()
                return False
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        self.deepspeed.step()
        self.overflowed = scaler is not None and scaler.get_scale() < scale
        # A scale of 1 or less cannot be what made them infinite.
        applied = bool(self.deepspeed.was_step_applied()) and not (self.overflowed and scale <= 1)
        if not applied:
            self._restore_statistics()
        return applied

    def skip_step(self) -> None:
        """End a step in place of `finish_step`: its gradients and statistics are dropped. On every rank."""
        attributes = vars(self.torch_optimizer)
        attributes["step"] = lambda *_, **__: None  # whatever DeepSpeed does around it goes on
        try:
            self.deepspeed.step()
        finally:
            del attributes["step"]
        self._restore_statistics()

    def _restore_statistics(self) -> None:
        for name, buffer in self.step_module.network.named_buffers():
            buffer.copy_(self.statistics[name])

    def close(self) -> None:
        """Let go of the network: until then DeepSpeed's hooks hold it, also when nobody else does."""
        self.deepspeed.destroy()

    def set_rate(self, rate: float) -> None:
        """Learning rate of the coming optimizer step; the decoders' is `optim.decoder_lr` times that."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]

    def set_reversal(self, factor: float) -> None:
        """Factor of the domain discriminator's reversed gradient in the coming step."""
        self.step_module.reversal = factor

    def set_shares(self, ddp_low: float, auxiliary: float) -> None:
        """Shares of `loss.beta`, the weight of the low-level penalty, and of all weights in the coming step's loss."""
        self.step_module.objective = self.config.loss.objective(ddp_low, auxiliary)


def build_engine(config: Config, ranks: Ranks, network: Network) -> Engine:
    """Hand a network (with its starting weights in place) to DeepSpeed.

    Raises:
        UserError: SyncBatchNorm on a CPU, or a batch that the ranks cannot divide.
    """
    accumulation = micro_batches(config, ranks)
    if config.model.sync_bn:
        if ranks.device.type != "cuda":
            raise UserError("model.sync_bn=true needs GPUs: set it to false to train on a CPU")
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    # The parameters stay contiguous (DeepSpeed views them as flat bytes): channels_last comes in with the clips.
    network.to(ranks.device)
    step_module = TrainingStep(network.train(), config.loss.objective(), config.target.weight)
    if config.model.compile:
        network.heads = torch.compile(network.heads)  # type: ignore[method-assign]  # `compile()` is for __call__ alone
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=step_module,
        optimizer=build_optimizer(step_module.network, config.optim),
        config=deepspeed_config(config, ranks, sum(p.numel() for p in step_module.parameters())),
    )
    built = Engine(deepspeed=engine, step_module=step_module, accumulation=accumulation, config=config, ranks=ranks)
    built.create_optimizer_state()
    return built
