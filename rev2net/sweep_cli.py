"""`rev2net sweep`: the paper's coarse-to-fine search for the loss weights."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rev2net.config brings torchvision, which takes seconds that a mistyped command should not
    from rev2net.config import Config
    from rev2net.grid import Search

DESCRIPTION = """Search alpha, beta, lambda_flow and lambda_im of the loss, first on the paper's coarse grid, then on
its fine one. Each run is a training of CONFIG without a tenth of its training clips (data.holdout), on which the
weights are selected; the validation split is not opened. All is kept in a folder beside CONFIG's output, named
OUTPUT-sweep. The same command again goes on where it was killed, and does no finished run twice.
"""

_EXAMPLES = """examples:
  rev2net sweep configs/demo.yaml --dry-run                   the runs, without doing them
  rev2net sweep configs/demo.yaml data.holdout=0.2 eval.views=1x1
  rev2net sweep --full configs/demo.yaml                      all combinations, not one weight at a time
  deepspeed --num_gpus 8 --module rev2net sweep configs/ucf101-imagenet/rev2net.yaml
  rev2net-cluster sweep configs/ucf101-imagenet/rev2net.yaml --tasks 6 --gpus-per-node 8
"""

FULL = "all combinations of the weights (1,296 + 625 runs), not one weight at a time (24 + 20)"


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net sweep`."""
    parser.description = DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the file")
    parser.add_argument("--full", action="store_true", help=FULL)
    parser.add_argument("--dry-run", action="store_true", help="print the grids and how many runs they are")


def run_sweep(args: argparse.Namespace) -> int:
    """`rev2net sweep`."""
    from rev2net.cli import is_first, ui_command
    from rev2net.config import load_config
    from rev2net.grid import Search, sweep_config

    config = load_config(args.config, args.overrides)
    search = Search.of(config, full=args.full)
    whole = sweep_config(config)
    if args.dry_run:
        if is_first():
            print(plan(whole, search))
        return 0
    from rev2net.sweep import sweep

    ended = sweep(whole, search)
    assert ended is not None  # nobody asks it to stop
    if is_first():
        others = [word for word in args.overrides if not word.startswith(("data.holdout=", "output="))]
        # Under the own name there may be a run with other weights; CONFIG may say what is held out.
        others += ["data.holdout=0", f"output={config.output}-winner"]
        print(f"\n{ended.table}\n")
        print(f"winner      {' '.join(ended.winner)}: top-1 {ended.result.top1:.1%} of the clips held out")
        print(f"train it    {shlex.join(['rev2net', 'train', args.config, *others, *ended.winner])}")
        print(f"watch it    {ui_command(ended.tracking_uri)}")
    return 0


def plan(config: Config, search: Search) -> str:
    """What a sweep will do, for `--dry-run`."""

    def values(grid: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}" for value in grid)

    coarse, fine = search.sizes
    how = "all combinations" if search.full else f"one after another, from {' '.join(search.overrides(search.start))}"
    return "\n".join(
        [
            f"{config.output}: {', '.join(search.weights)}, {how}",
            f"coarse      {coarse} runs: {values(search.coarse)}",
            f"fine        {fine} runs: {values(search.fine)} of each weight's coarse winner",
            f"in all      {coarse + fine} runs, less those that stand in several grids, which are done once",
            f"selected    by accuracy on {config.data.holdout:.0%} of split {config.data.train_split}, held out",
        ]
    )
