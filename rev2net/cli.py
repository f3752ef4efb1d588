"""The command `rev2net`: exit status 0 on success, 2 on a user's mistake (one sentence on stderr), 1 on failure."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dataloaders.errors import UserError, describe_failure

log = logging.getLogger("rev2net")

_EXAMPLES = """examples:
  rev2net synth clips                                       generated action clips, to try things on
  rev2net prepare folder clips data --codec vp9             videos -> flow -> tar shards
  rev2net train configs/demo.yaml data.path=data            on one process
  deepspeed --num_gpus 2 --module rev2net train configs/demo.yaml data.path=data
  rev2net eval runs/demo data --views 10x3
"""

_TRAIN = """Train as CONFIG says. The same command again goes on from the last checkpoint.

examples:
  rev2net train configs/demo.yaml
  rev2net train configs/demo.yaml train.seed=1 output=runs/demo-1 optim.lr=5e-4
  deepspeed --num_gpus 2 --module rev2net train configs/demo.yaml
"""

_EVAL = """Accuracy of a checkpoint's test-time network (the encoder alone). Every video counts exactly once.

examples:
  rev2net eval runs/demo data
  rev2net eval runs/demo/checkpoints/step-00000300 data --views 10x3 --split val
  rev2net eval runs/demo data --backwards --json scores.json
"""


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The deepspeed launcher adds it in front; the rank is read from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _mount(commands, "synth", "generated action clips, a folder per class", "dataloaders.synth", "synth")
    _mount(commands, "prepare", "videos to flow to tar shards", "dataloaders.prepare_cli", "prepare")
    _mount(commands, "verify", "check a prepared data set", "dataloaders.verify", "verify")
    _mount(commands, "browse", "a prepared data set as one HTML page", "dataloaders.browse", "browse")
    _mount(commands, "checkpoint", "show, verify or export checkpoints", "rev2net.checkpoint_cli", "checkpoint")
    plain = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser("train", help="train a network", description=_TRAIN, formatter_class=plain)
    train.add_argument("config", metavar="CONFIG", help="YAML file of the experiment")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the file")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("eval", help="test a checkpoint", description=_EVAL, formatter_class=plain)
    _add_eval_arguments(evaluate)
    evaluate.set_defaults(run=_eval)
    bench = commands.add_parser("bench", help="measure parts of the system on this machine")
    parts = bench.add_subparsers(dest="part", required=True, metavar="PART", parser_class=_Parser)
    _mount(parts, "loader", "clips/s of each decoding backend", "dataloaders.bench", "bench")
    return parser


def _mount(commands: argparse._SubParsersAction[_Parser], name: str, summary: str, module: str, function: str) -> None:
    """Add a command whose arguments and work another module defines."""
    parser = commands.add_parser(name, help=summary)
    loaded = importlib.import_module(module)
    getattr(loaded, f"add_{function}_arguments")(parser)
    parser.set_defaults(run=getattr(loaded, f"run_{function}"))


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
    parser.add_argument("data", metavar="DATA", help="folder that `rev2net prepare` made, or its URL")
    parser.add_argument("--split", default="val")
    parser.add_argument("--views", default="10x3", help="CLIPSxCROPS or whole (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="clips of one forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--backend", choices=("auto", "dali", "pyav"), default="auto")
    parser.add_argument("--backwards", action="store_true", help="play every clip backwards")
    parser.add_argument("--confusion", metavar="FILE.png", help="write the confusion matrix as a picture")
    parser.add_argument("--json", metavar="FILE", help="write metrics and confusion matrix; - for standard output")


def _train(args: argparse.Namespace) -> int:
    from rev2net.config import load_config

    config = load_config(args.config, args.overrides)
    from rev2net.train import train

    started = time.perf_counter()
    result = train(config)
    if _first():
        _report(result.metrics, time.perf_counter() - started)
        print(f"checkpoint  {result.checkpoint}")
        if result.run_id is not None:
            print(f"watch it    {ui_command(result.tracking_uri)}")
    return 0


def _report(values: dict[str, float], seconds: float) -> None:
    print(f"\n{'result':<24}{'value':>10}")
    for name, value in values.items():
        shown = f"{value:.1%}" if name in ("val/top1", "val/top5", "val/mean_class") else f"{value:.4f}"
        print(f"{name:<24}{shown:>10}")
    print(f"{'seconds':<24}{seconds:>10.1f}\n")


def ui_command(uri: str) -> str:
    """The one line that opens MLflow's pages on a store."""
    if uri.startswith(("http://", "https://")):
        return f"open {uri} in a browser"
    return f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}"


def _eval(args: argparse.Namespace) -> int:
    import torch

    from dataloaders.shards import DataSet
    from rev2net import checkpoint, pictures
    from rev2net.distributed import join, read_ranks
    from rev2net.train import evaluate_split

    found = checkpoint.find(args.checkpoint)
    network, config, state = checkpoint.load_encoder(found)
    data = DataSet.open(args.data)
    data.shards(args.split)
    if data.classes != state.classes:
        raise UserError(
            f"{found} knows {len(state.classes)} classes ({', '.join(state.classes[:3])}, ...) and {args.data} has "
            f"{len(data.classes)} ({', '.join(data.classes[:3])}, ...): evaluate on data prepared with the same classes"
        )
    updates = {
        "data": config.data.model_copy(update={"path": args.data, "val_split": args.split}),
        "eval": config.eval.model_copy(update={"views": args.views, "batch": args.batch}),
        "loader": config.loader.model_copy(update={"backend": args.backend}),
        "train": config.train.model_copy(update={"precision": args.precision}),
    }
    config = config.model_copy(update=updates)
    ranks = read_ranks()
    if ranks.world_size > 1:
        join(ranks, config.train.threads)
    network = network.to(ranks.device).to(memory_format=torch.channels_last_3d)
    result = evaluate_split(network, data, config, ranks, backwards=args.backwards)
    if not ranks.first:
        return 0
    values = {"top1": result.top1, "top5": result.top5, "mean_class": result.mean_class}
    where = sys.stderr if args.json == "-" else sys.stdout
    print(f"{found} on {args.data}, split {args.split}, views {args.views}: {result.videos} videos", file=where)
    for name, value in values.items():
        print(f"{name:<12}{value:>8.1%}", file=where)
    for sample, reason in result.failed.items():
        print(f"failed, counted as wrong: video {sample}: {reason}", file=where)
    if args.confusion:
        title = f"top-1 {result.top1:.1%} of {result.videos} videos"
        pictures.confusion_matrix(result.confusion, data.classes, title).savefig(args.confusion)
    if args.json:
        tree = {
            **values,
            "videos": result.videos,
            "failed": {str(k): v for k, v in result.failed.items()},
            "classes": data.classes,
            "confusion": result.confusion.tolist(),
        }
        text = json.dumps(tree)
        print(text) if args.json == "-" else Path(args.json).write_text(text)
    return 0


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _quiet_libraries() -> None:
    for name in ("DeepSpeed", "alembic", "matplotlib", "torch.distributed", "numba"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    if _first():
        for package in ("rev2net", "dataloaders"):
            logging.getLogger(package).setLevel(logging.INFO)
    _quiet_libraries()
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except UserError as error:
        if _first():
            print(f"rev2net {args.command}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # the launcher ends all ranks when one ends: let the first one speak
        return 2
    except (OSError, RuntimeError) as error:
        log.debug("failed", exc_info=True)
        print(f"rev2net {args.command} failed: {describe_failure(error)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"rev2net {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
