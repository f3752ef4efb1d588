"""`rev2net checkpoint show | verify | export-weights`: look into checkpoints, check them, take the weights out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataloaders.errors import UserError
from dataloaders.shards import check_output, written_aside

_SHOW = """What is in a run's checkpoints, or in one of them.

examples:
  rev2net checkpoint show runs/demo
  rev2net checkpoint show runs/demo/checkpoints/best
"""

_VERIFY = """Compare size and hash of every file of a run's checkpoints, or of one; exit status 1 if one is damaged.

example: rev2net checkpoint verify runs/demo
"""

_EXPORT = """Write the weights of the test-time network alone: an I3D's under the names of piergiaj/pytorch-i3d, those
of a network on a ResNet under torchvision's, after `backbone.` or `trunk.`.

examples:
  rev2net checkpoint export-weights runs/demo/checkpoints/best i3d.safetensors
  rev2net checkpoint export-weights runs/demo i3d.pt                 a state_dict for torch.load(..., weights_only=True)
  rev2net checkpoint export-weights runs/demo all.safetensors --all  latents and decoders too
"""

_SUFFIXES = (".safetensors", ".pt")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net checkpoint`."""
    plain = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART", parser_class=type(parser))

    def add(name: str, summary: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        part = parts.add_parser(name, help=summary, description=text, formatter_class=plain)
        part.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
        part.set_defaults(run_part=run)
        return part

    add("show", "what is in them", _SHOW, _show)
    add("verify", "sizes and hashes of their files", _VERIFY, _verify)
    export = add("export-weights", "the test-time network's weights as one file", _EXPORT, _export)
    export.add_argument("out", metavar="OUT", type=Path, help="file to write, .safetensors or .pt")
    export.add_argument("--all", action="store_true", help="latents and decoders too")


def run_checkpoint(args: argparse.Namespace) -> int:
    """Run the part; its exit status."""
    status: int = args.run_part(args)
    return status


def _of(path: str, pattern: str | None = None) -> list[Path]:
    """All checkpoints of a run, or what else lies there under a name of the pattern, or the one that is named."""
    from rev2net import checkpoint

    found = checkpoint.find(path)
    one = Path(path).name in (found.name, checkpoint.LATEST, checkpoint.BEST)
    if one:
        return [found]
    return checkpoint.checkpoints(found.parent) if pattern is None else sorted(found.parent.glob(pattern))


def _show(args: argparse.Namespace) -> int:
    from rev2net import checkpoint

    found = _of(args.checkpoint)
    latest, best = checkpoint.latest(found[0].parent), checkpoint.best(found[0].parent)
    print(f"{'checkpoint':<16}{'MB':>8}{'ranks':>7}{checkpoint.METRIC:>10}  written under")
    for path in found:
        try:
            state = checkpoint.read_state(path)
        except UserError:
            if len(found) == 1:
                raise
            print(f"{path.name:<16}cannot be read: see `rev2net checkpoint verify`")
            continue
        values = checkpoint.read_evaluation(path)
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        accuracy = "-" if values is None else f"{values[checkpoint.METRIC]:.1%}"
        train, optim = state.config["train"], state.config["optim"]
        words = f"{state.config['model']['name']}, ZeRO-{train['zero_stage']}, {train['precision']}, {optim['name']}"
        marks = [m for m, other in (("latest", latest), ("best", best)) if other == path]
        print(f"{path.name:<16}{size:>8.1f}{state.world_size:>7}{accuracy:>10}  {', '.join([words, *marks])}")
    if len(found) == 1:
        _details(state)
    return 0


def _details(state: Any) -> None:
    shown = f"{', '.join(state.classes[:5])}{', ...' if len(state.classes) > 5 else ''}"
    for name, value in (
        ("classes", f"{len(state.classes)} ({shown})"),
        ("skipped steps", state.skipped),
        ("replaced clips", state.replaced),
        ("MLflow run", state.run_id or "none"),
        ("configuration", json.dumps(state.config)),
    ):
        print(f"{name:<16}{value}")


def _verify(args: argparse.Namespace) -> int:
    from rev2net import checkpoint

    damaged = 0
    for path in _of(args.checkpoint, "step-*"):
        try:
            wrong = checkpoint.damage(path)
        except OSError as error:
            wrong = f"cannot be read: {error}"
        damaged += wrong is not None
        print(f"{path}: {'ok' if wrong is None else wrong}", flush=True)
    return 1 if damaged else 0


def _export(args: argparse.Namespace) -> int:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from rev2net import checkpoint

    out: Path = args.out
    check_output(out, _SUFFIXES)
    found = checkpoint.find(args.checkpoint)
    network, config, state = (checkpoint.load_network if args.all else checkpoint.load_encoder)(found)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    try:
        with written_aside(out) as aside:
            if out.suffix == ".pt":
                torch.save(weights, aside)
            else:
                about = {"classes": json.dumps(state.classes), "config": json.dumps(config.model_dump(mode="json"))}
                save_file(weights, aside, metadata=about)
    except SafetensorError as error:
        raise OSError(f"{out} could not be written: {error}") from error
    print(f"{out}: {sum(w.numel() for w in weights.values()) / 1e6:.1f} M numbers of {found}", file=sys.stderr)
    return 0
