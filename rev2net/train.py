"""The training loop. Run it alone, under `deepspeed`, torchrun or submitit: it is the same function."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataloaders.bad_clips import BadClips
from dataloaders.batch import ClipBatch
from dataloaders.keyed import hash64
from dataloaders.loader import EvalLoader
from dataloaders.shards import DataSet, write_atomically
from rev2net import checkpoint, pictures, snapshot
from rev2net.config import Config, to_steps
from rev2net.data import counts, eval_loader, open_data, open_target, train_loader
from rev2net.distributed import Ranks, join, limit_collectives, read_ranks
from rev2net.engine import Engine, build_engine, conv3d_warning, micro_batches, settle_precision
from rev2net.evaluate import Metrics, decoder_errors, for_testing, metrics, split_scores
from rev2net.heartbeat import Heartbeat
from rev2net.models.build import build_network
from rev2net.models.dann import reversal_factor
from rev2net.models.heads import Network
from rev2net.models.imagenet import load_weights
from rev2net.optim import Schedule, build_schedule, fading, growing
from rev2net.outbox import run_of
from rev2net.progress import Profile, StepLog
from rev2net.resume import changes, hold, refuse_another_run
from rev2net.tracking import Tracker

log = logging.getLogger("rev2net")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a training ended.

    Attributes:
        step: optimizer steps done.
        finished: False where a stop was requested before the end.
        metrics: accuracy and decoder errors on the validation split (`val/...`), accuracy on the target domain's
            (`target/...`); empty if not finished.
        checkpoint: the last checkpoint.
        run_id: the MLflow run, or None (tracking is off, or its server was away all the time).
        tracking_uri: where that run is kept.
    """

    step: int
    finished: bool
    metrics: dict[str, float]
    checkpoint: str
    run_id: str | None
    tracking_uri: str


def train(config: Config, *, stop_requested: Callable[[], bool] = lambda: False) -> TrainResult:
    """Train as configured, going on from the output folder's last checkpoint if there is one.

    Args:
        config: the experiment.
        stop_requested: looked at once a step, and now and then in an evaluation; when it is true on any rank, all ranks
            save together and return. An evaluation that is not done then is done by the next start.

    Raises:
        UserError: the configuration does not fit the data, the ranks or the checkpoint.
        NonFiniteLossError: losses or gradients were NaN or infinite several steps in a row.
        RuntimeError: too many clips cannot be decoded.
        OSError: a checkpoint could not be written.
    """
    done = _finished(config)
    if done is not None:
        log.info(
            "%s is complete (step %d): nothing to do; choose another output= to train again", config.output, done.step
        )
        first = read_ranks().first
        Tracker(config, active=first, resumed=done.step, complete=True, run_id=done.run_id).close()
        return done
    with ExitStack() as stack:
        run = TrainingRun(config, stop_requested, stack.enter_context(ExitStack()))
        stack.callback(run.leave)
        stack.callback(run.engine.close)
        stack.enter_context(run.tracker)
        for loader in run.loaders:
            stack.callback(loader.close)
        stack.enter_context(run.heart)
        stopped = not run.evaluate_if_due()  # it may have been killed between saving and evaluating
        while run.step < run.total and not stopped:
            scalars, stopped = run.train_step()
            run.report(scalars)
            if stopped or run.step == run.total or run.due(config.train.checkpoint_every, config.train.eval_every):
                run.save(config.train.keep_checkpoints)
            if not stopped:
                stopped = not run.evaluate_if_due()
        return run.finish(stopped)


MAX_SKIPPED = 3
"""Steps in a row without finite loss and gradients that end the run."""


class NonFiniteLossError(RuntimeError):
    """`MAX_SKIPPED` steps in a row had no finite loss or gradients; the message names the ranks and the clips."""


ASK_EVERY = 20
"""Batches of an evaluation after which the ranks agree on whether one of them is to stop."""


class EvaluationStoppedError(Exception):
    """A rank is to stop; on all ranks alike."""


class TrainingRun:
    """Everything that the loop drives: data, engine, schedule, log, tracker, and the step it stands at."""

    def __init__(
        self, config: Config, stop_requested: Callable[[], bool] = lambda: False, held: ExitStack | None = None
    ) -> None:
        self.config = asked = config
        self._stop_requested = stop_requested
        self.ranks: Ranks = read_ranks()
        self.accumulation = micro_batches(config, self.ranks)
        self.data = open_data(config)
        self.target = open_target(config, self.data.classes)
        samples = self.data.num_samples(config.data.train_split)
        batch = config.train.global_batch
        self._in_steps = partial(to_steps, global_batch=batch, epoch_samples=samples)
        self.total = self._in_steps(config.train.duration, "train.duration")
        self.ddp_low_from = self._in_steps(config.loss.ddp_low_from, "loss.ddp_low_from")
        fade_from = config.loss.fade_from
        self.fade_from = self.total if fade_from is None else self._in_steps(fade_from, "loss.fade_from")
        self.schedule: Schedule = build_schedule(config, total=self.total, epoch_samples=samples)
        self.folder = Path(config.output) / "checkpoints"
        join(self.ranks, config.train.threads)
        self._held = held or ExitStack()
        hold(Path(config.output), self.ranks, self._held)
        self.config = config = settle_precision(config, self.ranks)
        self._writer = checkpoint.CheckpointWriter(self.folder)
        resumed = self.ranks.broadcast(checkpoint.recover(self.folder) if self.ranks.first else None)
        self.engine, state = self._start_engine(resumed)
        self.step: int = state.step if state else 0
        self._begun_at = self.step
        self.skipped: int = state.skipped if state else 0
        self._skipped_in_a_row = 0
        self.replaced: int = state.replaced if state else 0
        self._replaced_before = self.replaced  # before the steps that were skipped in a row
        self._own_failures = 0
        self._limited = False
        self.loaders = [train_loader(self.data, config, self.ranks, self.step)]
        if self.target is not None and config.target.trained_on:
            # Both start at the same step, so that every rank's batches are paired whenever it starts.
            self.loaders.append(train_loader(self.target, config, self.ranks, self.step, of_target=True))
        self._bad_clips = BadClips(config.loader.max_bad, seen=self.step * batch * len(self.loaders))
        self.tracker = Tracker(
            config,
            active=self.ranks.first,
            resumed=state.step if state else None,
            run_id=state.run_id if state else None,
            facts=self._facts(fresh=state is None),
        )
        self.log = StepLog(
            total=self.total,
            first=self.step,
            batch=batch,
            every=config.train.log_every,
            ranks=self.ranks,
            begun=state.log if state else None,
        )
        self.heart = Heartbeat(
            self.ranks,
            Path(config.output) / "heartbeat",
            60 * config.train.hang_minutes,
            on_hang=lambda _: self.tracker.fail(),
        )
        self.profile = Profile(config.profile.steps if self.ranks.first else None, Path(config.output))
        self.log_file = _open_folder(asked) if self.ranks.first else logging.NullHandler()
        self._announce(resumed, state)

    def _start_engine(self, resumed: Path | None) -> tuple[Engine, checkpoint.RunState | None]:
        torch.manual_seed(hash64(self.config.train.seed) % 2**63)  # starting weights, the same on every rank
        start = self.config if resumed is None and self.config.init_from is None else without_imagenet(self.config)
        network = build_network(start, len(self.data.classes))
        self._parameters = sum(p.numel() for p in network.encoder.parameters())  # before ZeRO-3 cuts them up
        if resumed is None:
            if self.config.init_from is not None:
                start_from(network, self.config.init_from, self.data.classes)
            return build_engine(self.config, self.ranks, network), None
        state = checkpoint.read_state(resumed)
        refuse_another_run(state, resumed, self.config, self._trained_on, complete=state.step >= self.total)
        checkpoint.load_weights(network, resumed)
        if state.world_size == self.ranks.world_size:
            snapshot.restore_buffers(network, checkpoint.read_tensors(resumed, "buffers"), self.ranks)
        engine = build_engine(self.config, self.ranks, network)
        snapshot.restore_optimizer(engine, checkpoint.read_tensors(resumed, "optimizer"), state.updates)
        engine.restore_loss_scale(state.loss_scale)
        return engine, state

    @property
    def _trained_on(self) -> dict[str, DataSet]:
        target = self.target if self.config.target.trained_on else None
        return {"data": self.data} if target is None else {"data": self.data, "target": target}

    def _facts(self, *, fresh: bool) -> dict[str, str]:
        """What `rev2net report` wants to know beside the configuration."""
        data, target = self.config.data, self.config.target
        facts = {"train.steps": str(self.total)}
        for name, found, section in (("data", self.data, data), ("target", self.target, target)):
            if found is not None:
                told = counts(found, section.train_split, section.val_split)
                facts |= {f"{name}.{key}": value for key, value in told.items()}
        start = self.config.init_from
        if fresh and start is not None and not checkpoint.is_file_of_weights(start):
            weights = checkpoint.find(start)
            state = checkpoint.read_state(weights)
            facts |= {"init_from.run": str(run_of(weights, state.run_id)), "init_from.step": str(state.step)}
        return facts

    def _announce(self, resumed: Path | None, state: checkpoint.RunState | None) -> None:
        log.info(
            "%s with %s on %s: %d clips, %d classes, %d steps of %d clips in %s on %d %s rank(s), "
            "encoder of %.1f M parameters",
            self.config.model.name,
            " and ".join(self.config.decoders) + " decoder" if self.config.decoders else "no decoder",
            self.config.data.path,
            self.data.num_samples(self.config.data.train_split),
            len(self.data.classes),
            self.total,
            self.config.train.global_batch,
            self.config.train.precision,
            self.ranks.world_size,
            self.ranks.device.type,
            self._parameters / 1e6,
        )
        if self.target is not None and self.config.target.trained_on:
            clips = self.target.num_samples(self.config.target.train_split)
            log.info("adapting to %s: %d clips without labels", self.target.location, clips)
        if resumed is not None:
            log.info("going on from %s at step %d", resumed, self.step)
        changed = () if state is None else changes(state, self.config)
        for warning in (*self._warnings(), *changed) if self.ranks.first else ():  # other ranks' are shown too
            log.warning(warning)

    def _warnings(self) -> Iterator[str]:
        config = self.config
        slow = conv3d_warning(torch.__version__, torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        if slow is not None and self.ranks.device.type == "cuda":
            yield slow
        if config.loss.ddp in ("low", "both") and self.ddp_low_from >= self.total:
            yield (
                f"the low-level penalty never acts: loss.ddp_low_from={config.loss.ddp_low_from} is not before the "
                f"end, step {self.total}"
            )
        if config.model.partial_bn and config.model.imagenet is None and config.init_from is None:
            yield (
                "model.partial_bn=true keeps statistics that nobody has learned: set it to false, or give "
                "model.imagenet or init_from"
            )

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step, or none where the loss or a gradient is not finite.

        Returns:
            The scalars averaged over the global batch (empty for a skipped step), and if any rank wants to stop.
        """
        self.engine.set_rate(self.schedule.rate(self.step))
        self.engine.set_shares(growing(self.step, self.ddp_low_from), fading(self.step, self.fade_from, self.total))
        self.engine.set_reversal(reversal_factor(self.step, self.total))
        stop = self._stop_requested()
        sums: dict[str, Tensor] = {}
        keys: list[str] = []
        number = self.step + 1
        for index in range(self.accumulation):
            self.heart.beat(f"waits for clips of step {number}")
            batches = [self._placed(next(loader)) for loader in self.loaders]
            self.heart.beat(f"computes step {number}")
            keys += [key for batch in batches for key in batch.keys]
            for name, value in self.engine.forward_backward(self.step, index, *batches).items():
                sums[name] = sums.get(name, 0.0) + value / self.accumulation
            if index < self.accumulation - 1:
                self.engine.micro_step()
        # Averaged scalars, the wish to stop and what went wrong, in one collective, before the optimizer steps.
        self.heart.beat(f"averages the losses of step {number} over the ranks")
        failures = sum(len(loader.failures) for loader in self.loaders) - self._own_failures
        self._own_failures += failures
        counts = torch.tensor([float(stop), failures, float(self._writer.failed)], device=self.ranks.device)
        own = torch.stack([*sums.values(), *counts])
        *values, stops, replaced, unsaved = self.ranks.mean(own).tolist()
        if unsaved:
            self.finish_saving()
        self._count_replaced(round(replaced * self.ranks.world_size))
        finite = all(map(math.isfinite, values))  # on all ranks alike: a sum with one NaN is NaN
        if not finite:
            self.engine.skip_step()
            self._count_skipped("its loss is not finite on " + self._whose(bool(own.isfinite().all()), keys))
        elif not self.engine.finish_step():
            finite = False
            self._count_skipped("its loss is finite, but its gradients are not")
        else:
            self._skipped_in_a_row = 0
        self.step += 1
        if not self._limited:
            self._limit_waiting()
        self.profile.step(self.step)
        scalars = dict(zip(sums, values, strict=True)) if finite else {}
        if finite and self.config.train.precision == "fp16":
            scalars["scaler/skipped"] = float(self.engine.overflowed)  # logged as the share of steps
        return scalars, stops > 0

    def _placed(self, batch: ClipBatch) -> ClipBatch:
        return batch.to(self.ranks.device, channels_last=self.config.train.channels_last)

    def _limit_waiting(self) -> None:
        """After the first step of this start: what takes long now hangs."""
        self._limited = True
        self.heart.first_step_done()
        if self.config.train.hang_minutes:
            # The watch, which can name who hangs, comes first.
            limit_collectives(2 * 60 * self.config.train.hang_minutes)

    def _count_replaced(self, clips: int) -> None:
        """On all ranks alike: too many end the run on each of them."""
        if self._skipped_in_a_row == 0:
            self._replaced_before = self.replaced
        self.replaced += clips
        self._bad_clips.add(clips, self.config.train.global_batch * len(self.loaders))

    def _whose(self, fine: bool, keys: list[str]) -> str:
        """The ranks that are not `fine`, and their clips. A collective."""
        reports = self.ranks.gather((fine, keys))
        return "; ".join(f"rank {r} (clips {', '.join(k)})" for r, (own, k) in enumerate(reports) if not own)

    def _count_skipped(self, reason: str) -> None:
        """The step left everything as it was; the third time in a row ends the run. A collective."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < MAX_SKIPPED:
            if self.ranks.first:
                log.warning("step %d is skipped: %s", self.step + 1, reason)
            return
        last = self.step + 1
        self.step = last - MAX_SKIPPED  # nothing has changed since
        self.skipped -= MAX_SKIPPED
        self.replaced = self._replaced_before
        self.finish_saving()
        saved = checkpoint.folder_of(self.folder, self.step)
        older = [each for each in checkpoint.checkpoints(self.folder) if each < saved]
        if self.ranks.broadcast(checkpoint.latest(self.folder) != saved):
            self.save(keep=None)
            self.finish_saving()
        raise NonFiniteLossError(
            f"{MAX_SKIPPED} steps in a row were skipped; of step {last}: {reason}. The state before them is saved in "
            f"{saved} (the checkpoint before it is {older[-1] if older else None}): look at the clips, or lower "
            "optim.lr, and run the same command again; delete the newest checkpoint if its weights are the trouble"
        )

    def report(self, scalars: dict[str, float]) -> None:
        """Log line and MLflow metrics, every `train.log_every` steps, averaged over them."""
        waited = sum(loader.wait_seconds for loader in self.loaders)
        line = self.log.add(self.step, scalars, self.schedule.rate(self.step - 1), waited)
        if line is not None:
            counts = {"skipped_steps": self.skipped, "replaced_clips": self.replaced}
            self.tracker.metrics({**line, **counts}, self.step)

    def due(self, *every: str | int | None) -> bool:
        """True at the steps that are multiples of one of the durations (None is never)."""
        return any(self.step % max(1, self._in_steps(e, "interval")) == 0 for e in every if e is not None)

    def save(self, keep: int | None = None) -> None:
        """Write a checkpoint in the background, and drop all but the last `keep` and the best. A collective.

        Raises:
            OSError: the one before could not be written, on all ranks alike.
        """
        self.finish_saving()
        begin = time.perf_counter()
        self.heart.beat(f"takes a copy of the state at step {self.step}")
        state = checkpoint.RunState(
            step=self.step,
            run_id=self.tracker.run_id,
            classes=self.data.classes,
            world_size=self.ranks.world_size,
            config=self.config.model_dump(mode="json"),
            preparation=self.data.preparation,
            official=dict(self.data.official or {}),
            target_official=dict(self.target.official or {}) if self.target is not None else {},
            trained_on={name: data.fingerprint() for name, data in self._trained_on.items()},
            updates=self.engine.updates,
            skipped=self.skipped,
            replaced=self.replaced,
            loss_scale=self.engine.loss_scale,
            log=self.log.begun,
        )
        copy = snapshot.take(self.engine)
        if copy is not None:
            self._writer.start(copy, state, keep)
        self.tracker.metrics({"checkpoint_stall_seconds": time.perf_counter() - begin}, self.step)

    def finish_saving(self) -> None:
        """Wait until the checkpoint under way is on disk. A collective.

        Raises:
            OSError: it could not be written, on all ranks alike.
        """
        self.heart.beat("waits for the checkpoint under way")
        error = self.ranks.broadcast(self._writer.wait())
        if error is not None:
            raise OSError(error)

    def evaluate_if_due(self) -> bool:
        """Evaluate every `train.eval_every`, before the end; what was evaluated is not again. A collective.

        Returns:
            False where a rank is to stop, and it was not done.
        """
        if not 0 < self.step < self.total or not self.due(self.config.train.eval_every):
            return True
        path = checkpoint.folder_of(self.folder, self.step)
        if self.ranks.broadcast(checkpoint.read_evaluation(path) is not None):
            return True
        with self.log.paused():
            return self._evaluated() is not None

    def _evaluated(self) -> dict[str, float] | None:
        try:
            return self.evaluate()
        except EvaluationStoppedError:
            log.info("the evaluation of step %d is left to the next start, which begins it anew", self.step)
            if self.step == self._begun_at and self.ranks.first:
                log.warning(
                    "this start had time for a part of that evaluation and nothing else: where the next one has no "
                    "more, the run never ends; give it a longer time limit or more ranks, or set fewer eval.views"
                )
            return None

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the test-time network, and the decoders' errors, on the validation split (or what is held out).

        They are kept in the checkpoint of this step. A collective.

        Raises:
            EvaluationStoppedError: a rank is to stop.
        """
        self.heart.beat(f"evaluates step {self.step}")
        weights = snapshot.gather_weights(self.engine)
        network = build_network(without_imagenet(self.config), len(self.data.classes))
        network.load_state_dict(weights)
        for_testing(network, self.ranks.device)
        accuracy = {"val": self._accuracy(network, self.data, self.config.data.eval_split)}
        if self.target is not None and not self.config.data.holdout:  # what chooses settings sees no test clip
            accuracy["target"] = self._accuracy(network, self.target, self.config.target.val_split)
        values = {key: value for name, found in accuracy.items() for key, value in found.named(f"{name}/").items()}
        values["val/cross_entropy"] = accuracy["val"].cross_entropy
        if self.config.decoders:
            split = self.config.data.eval_split
            with eval_loader(self.data, split, self.config, self.ranks, "1x1", for_decoders=True) as loader:
                batches = self._watched(loader)
                errors = decoder_errors(network, batches, ranks=self.ranks, precision=self.config.train.precision)
            values |= {f"val/{name}": value for name, value in errors.items()}
        log.info("step %d, validation: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        self.tracker.metrics(values, self.step)
        self._draw(network, accuracy)
        self.finish_saving()
        if self.ranks.first:
            checkpoint.write_evaluation(checkpoint.folder_of(self.folder, self.step), values)
        return values

    def _accuracy(self, network: Network, data: DataSet, split: str) -> Metrics:
        scores = split_scores(network, data, split, self.config, self.ranks, watched=self._watched)
        return metrics(scores, len(data.classes))

    def _watched(self, loader: EvalLoader) -> Iterator[ClipBatch]:
        """Its batches, each of which counts as progress. A collective.

        Raises:
            EvaluationStoppedError: a rank is to stop.
        """
        batches = iter(loader)
        for index in range(1, 1 + max(self.ranks.gather(len(loader)))):  # all ranks ask as often
            batch = next(batches, None)
            if batch is not None:
                self.heart.move()
                yield batch
            if index % ASK_EVERY == 0:
                self.heart.beat("asks whether to stop")
                if self.ranks.any(self._stop_requested()):
                    raise EvaluationStoppedError
                self.heart.beat(f"evaluates step {self.step}")
        self.heart.beat("waits for the other ranks' part of the evaluation")

    def _draw(self, network: Network, accuracy: Mapping[str, Metrics]) -> None:
        if not self.ranks.first:
            return
        for name, found in accuracy.items():
            self.tracker.json(found.matrix(self.data.classes), f"confusion_{name}.json")
        own = accuracy["val"]
        title = f"step {self.step}: top-1 {own.top1:.1%} of {own.videos} videos"
        figure = pictures.confusion_matrix(own.confusion, self.data.classes, title)
        self.tracker.figure(figure, "confusion_matrix.png")
        if self.config.decoders:
            alone = Ranks(rank=0, world_size=1, local_rank=0, device=self.ranks.device)
            loader = eval_loader(self.data, self.config.data.eval_split, self.config, alone, "1x1", for_decoders=True)
            batch = next(iter(loader), None)
            loader.close()
            if batch is None:  # no clip of the split decodes
                return
            batch = batch.to(self.ranks.device, channels_last=True)
            figure = pictures.decoders(network, batch, f"step {self.step}: {batch.keys[0]}")
            self.tracker.figure(figure, "decoders.png")

    def leave(self) -> None:
        """Write no more to the run's log, and leave its folder to others."""
        logging.getLogger().removeHandler(self.log_file)
        self.log_file.close()
        self._held.close()

    def finish(self, stopped: bool) -> TrainResult:
        """Evaluate if the run is complete, and write `result.json`."""
        self.profile.close()
        self.log.close()
        self.finish_saving()
        values = self._evaluated() if self.step >= self.total else None
        finished = values is not None
        if finished:
            self.tracker.flush()
        else:
            self.tracker.interrupt()  # the job is about to be requeued, or killed
        result = TrainResult(
            step=self.step,
            finished=finished,
            metrics=values or {},
            checkpoint=str(checkpoint.latest(self.folder)),
            run_id=self.ranks.broadcast(self.tracker.run_id),
            tracking_uri=self.tracker.uri,
        )
        if stopped and not finished:
            log.info("stopped at step %d as requested; the same command goes on from there", self.step)
        if finished and self.ranks.first:
            write_atomically(Path(self.config.output) / "result.json", json.dumps(asdict(result), indent=1).encode())
        self.ranks.barrier()
        return result


def without_imagenet(config: Config) -> Config:
    """The same configuration for a network whose weights come from elsewhere."""
    return config.model_copy(update={"model": config.model.model_copy(update={"imagenet": None})})


def start_from(network: Network, path: str, classes: tuple[str, ...]) -> None:
    """`init_from`: a checkpoint of ours or a published file; the classifier stays fresh where it is for other classes.

    A published file does not say which classes it knows: there their number counts.

    Raises:
        UserError: neither of the two, or another architecture.
    """
    if checkpoint.is_file_of_weights(path):
        report = load_weights(network.encoder, path)
    else:
        found = checkpoint.find(path)
        others = checkpoint.read_state(found).classes != classes
        report = load_weights(network.encoder, checkpoint.check_weights(found), other_classes=others)
    log.info("starting from %s: %s", path, report)


def _finished(config: Config) -> TrainResult | None:
    """The result of an earlier run of exactly this configuration, if it came to its end."""
    output = Path(config.output)
    file, written = output / "result.json", output / "config.yaml"
    if not file.is_file() or not written.is_file() or written.read_text() != config.yaml():
        return None
    try:
        result = TrainResult(**json.loads(file.read_text()))
    except (ValueError, TypeError):  # of a disk that was full, or of another version: the end is done again
        return None
    return result if Path(result.checkpoint).is_dir() else None


def _open_folder(config: Config) -> logging.Handler:
    """Write the resolved configuration to the output folder, and a log that goes on over resumes; its handler."""
    output = Path(config.output)
    (output / "result.json").unlink(missing_ok=True)
    (output / "config.yaml").write_text(config.yaml())
    handler = logging.FileHandler(output / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)  # what the loader says of bad clips belongs in it too
    return handler
