"""The command `rev2net`: exit status 0 on success, 2 on a user's mistake (one sentence on stderr), 1 on failure."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

from dataloaders.errors import UserError, describe_failure, stop_printing

log = logging.getLogger("rev2net")

_EXAMPLES = """examples:
  rev2net synth clips                                       generated action clips, to try things on
  rev2net prepare folder clips data --codec vp9             videos -> flow -> tar shards
  rev2net train configs/demo.yaml data.path=data            on one process
  deepspeed --num_gpus 2 --module rev2net train configs/demo.yaml data.path=data
  rev2net eval runs/demo data --views 10x3
  rev2net predict runs/demo video.mp4                       the classes that any video shows
"""

_TRAIN = """Train as CONFIG says. The same command again goes on from the last checkpoint.

examples:
  rev2net train configs/demo.yaml
  rev2net train configs/demo.yaml train.seed=1 output=runs/demo-1 optim.lr=5e-4
  deepspeed --num_gpus 2 --module rev2net train configs/demo.yaml
"""


_FIRST_SPEAKS = 30.0
"""Seconds for rank 0 to tell a mistake: its end, by the launcher, is that of the other ranks, which know it as well."""

_PLAIN = argparse.RawDescriptionHelpFormatter


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="rev2net",
        description="Train Rev2Net video action recognition.",
        epilog=_EXAMPLES,
        formatter_class=_PLAIN,
    )
    # The deepspeed launcher adds it in front; the rank is read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _mount(commands, "synth", "generated action clips, a folder per class", "dataloaders.synth", "synth")
    _mount(commands, "prepare", "videos to flow to tar shards", "dataloaders.prepare_cli", "prepare")
    _mount(commands, "verify", "check a prepared data set", "dataloaders.verify", "verify")
    _mount(commands, "browse", "a prepared data set as one HTML page", "dataloaders.browse", "browse")
    _mount(commands, "checkpoint", "show, verify or export checkpoints", "rev2net.checkpoint_cli", "checkpoint")
    train = commands.add_parser("train", help="train a network", description=_TRAIN, formatter_class=_PLAIN)
    train.add_argument("config", metavar="CONFIG", help="YAML file of the experiment")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the file")
    train.set_defaults(run=_train)
    _mount(commands, "eval", "test a checkpoint", "rev2net.eval_cli", "eval")
    _mount(commands, "splits", "test a run for each official split, and their mean", "rev2net.eval_cli", "splits")
    _mount(commands, "predict", "what videos show", "rev2net.predict", "predict")
    _mount(commands, "export", "the test-time network as .pt2 or .onnx", "rev2net.export", "export")
    _mount(commands, "report", "the paper's tables from MLflow runs", "rev2net.report_cli", "report")
    _mount(commands, "sweep", "search the loss weights", "rev2net.sweep_cli", "sweep")
    bench = commands.add_parser("bench", help="measure parts of the system on this machine")
    parts = bench.add_subparsers(dest="part", required=True, metavar="PART", parser_class=_Parser)
    _mount(parts, "loader", "clips/s of each decoding backend", "dataloaders.bench", "bench")
    return parser


def _mount(commands: argparse._SubParsersAction[_Parser], name: str, summary: str, module: str, function: str) -> None:
    """Add a command whose arguments and work another module defines."""
    parser = commands.add_parser(name, help=summary, formatter_class=_PLAIN)
    loaded = importlib.import_module(module)
    getattr(loaded, f"add_{function}_arguments")(parser)
    parser.set_defaults(run=getattr(loaded, f"run_{function}"))


def _train(args: argparse.Namespace) -> int:
    from rev2net.config import load_config

    config = load_config(args.config, args.overrides)
    from rev2net.train import train

    started, stop = time.perf_counter(), _StopSignals()
    # A launcher ends its ranks by these signals, also where one has died.
    with stop.installed() if os.environ.get("WORLD_SIZE", "1") == "1" else nullcontext():
        result = train(config, stop_requested=stop)
    if stop.received and not result.finished:
        return 128 + stop.received
    if is_first():
        _report(result.metrics, time.perf_counter() - started)
        print(f"checkpoint  {result.checkpoint}")
        if result.run_id is not None:
            print(f"watch it    {ui_command(result.tracking_uri)}")
    return 0


class _StopSignals:
    """Ctrl-C or SIGTERM: the training saves after the step in hand, and ends; at a second Ctrl-C it ends at once."""

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Instead of what they do outside."""
        before = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _receive(self, signum: int, _: object) -> None:
        if signum == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"rev2net train: saving after the step in hand, then ending; Ctrl-C again ends at once\n")

    def __call__(self) -> bool:
        return bool(self.received)


def _report(values: dict[str, float], seconds: float) -> None:
    print(f"\n{'result':<24}{'value':>10}")
    for name, value in values.items():
        shown = f"{value:.1%}" if name.endswith(("/top1", "/top5", "/mean_class")) else f"{value:.4f}"
        print(f"{name:<24}{shown:>10}")
    print(f"{'seconds':<24}{seconds:>10.1f}\n")


def ui_command(uri: str) -> str:
    """The one line that opens MLflow's pages on a store."""
    if uri.startswith(("http://", "https://")):
        return f"open {uri} in a browser"
    return f"mlflow ui --host 127.0.0.1 --backend-store-uri {shlex.quote(uri)}"


def is_first() -> bool:
    """Whether this process is the one that speaks, by the launcher's RANK."""
    return os.environ.get("RANK", "0") == "0"


def _quiet_libraries() -> None:
    for name in ("DeepSpeed", "alembic", "matplotlib", "torch.distributed", "numba"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns where there is a CUDA compiler and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; key=value and videos may stand behind options too, where argparse does not look for them."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        name = next((name for name in ("overrides", "videos") if hasattr(args, name)), None)
        if name is None or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        setattr(args, name, [*getattr(args, name), *map(Path if name == "videos" else str, rest)])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parsed(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    # What the others print is a result, which may be read by a program.
    stream = sys.stdout if args.command in ("train", "sweep") else sys.stderr
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=stream)
    if is_first():
        for package in ("rev2net", "dataloaders"):
            logging.getLogger(package).setLevel(logging.INFO)
    _quiet_libraries()
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except UserError as error:
        if not is_first():
            time.sleep(_FIRST_SPEAKS)
        print(f"rev2net {args.command}: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # `predict ... | head`
        stop_printing()
        return 1
    except (OSError, RuntimeError) as error:
        log.debug("failed", exc_info=True)
        print(f"rev2net {args.command} failed: {describe_failure(error)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"rev2net {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
