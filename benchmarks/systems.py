"""Every system of the paper learns generated clips, and what DANN does to the target's accuracy: a row per training.

    python benchmarks/systems.py                       every run that systems.jsonl lacks, then the page
    python benchmarks/systems.py --only i3d            runs whose name starts so
    python benchmarks/systems.py --page                the page alone, from systems.jsonl

One training for each core, pinned to it: `rev2net train configs/demo.yaml ...` from random weights on clips of domain
a, last checkpoint. Seeds are not chosen; OFF's picture size was, by the validation clips of seed 0. A finished run is
never repeated: remove its line from systems.jsonl for that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from statistics import mean

from cores import each_on_a_core
from machine import cpu_facts
from trainings import ROOT, command, generated, keep, logged, result_of, rows

LOG, PAGE = ROOT / "benchmarks" / "systems.jsonl", ROOT / "benchmarks" / "systems.md"
WORK = ROOT / "runs" / "systems"
SEEDS = range(3)

SMALL = ("loss.ddp=none", "model.backbone=resnet18")
EIGHT = ("data.segments=8", "data.frames=8")
DENSE = ("data.frames=8", "data.stride=2")
SYSTEMS: dict[str, tuple[str, ...]] = {
    "tsn-one-frame": ("model.name=tsn", *SMALL, "data.segments=1", "data.frames=1"),
    "tsn-flow": ("model.name=tsn", *SMALL, "model.input=flow", "data.segments=3", "data.frames=15"),
    "tsm": ("model.name=tsm", *SMALL, *EIGHT),
    "stm": ("model.name=stm", "loss.ddp=none", *EIGHT, "train.duration=480steps"),
    "off": ("model.name=off", *SMALL, *DENSE, "data.size=112", "model.dropout=0.5"),
    "actionflownet": ("model.name=actionflownet", "loss.ddp=none", "loss.lambda_flow=1", "model.width=0.5", *DENSE),
    "i3d-flow": ("model.name=i3d", "loss.ddp=none", "model.input=flow", *DENSE),
    "i3d": ("model.name=i3d", "loss.ddp=none", "target.adapt=false", *DENSE),
    "rev2net": ("target.adapt=false", *DENSE),
    "i3d-dann": ("model.name=i3d", "loss.ddp=none", *DENSE),
    "rev2net-dann": DENSE,
}
"""Overrides of configs/demo.yaml. Those of I3D and Rev2Net on RGB have domain b as their target."""
BLIND, CHANCE, NEAR, LEARNED = "tsn-one-frame", 1 / 8, 0.1, 0.6


def prepare() -> None:
    """The two domains, rendered and prepared once."""
    for domain in "ab":
        generated(WORK / f"clips-{domain}", WORK / domain, "--domain", domain)


def train(run: tuple[str, int]) -> dict[str, object]:
    """The row of a system and seed, trained unless it is done."""
    system, seed = run
    output = WORK / f"{system}-{seed}"
    words = [f"data.path={WORK / 'a'}", f"output={output}", f"train.seed={seed}", *SYSTEMS[system]]
    if system.startswith(("i3d", "rev2net")) and system != "i3d-flow":
        words.append(f"target.path={WORK / 'b'}")
    command("rev2net", "train", "configs/demo.yaml", *words, log=output.with_suffix(".log"))
    result = result_of(output)
    row = {"system": system, "seed": seed, "date": str(date.today())}
    row |= {name: round(value, 4) for name, value in result["metrics"].items() if name.endswith("/top1")}
    if told := logged(output, "domain/accuracy"):  # means of 30 steps each
        row |= {"domain_first": round(mean(told[:3]), 4), "domain_highest": round(max(told), 4)}
        row |= {"domain_last": round(mean(told[-3:]), 4)}
    return row


def of(found: Sequence[dict[str, float]], system: str, key: str) -> list[float]:
    """A value of each seed of a system, where it has one."""
    return [row[key] for row in found if row["system"] == system and key in row]


def each(values: Sequence[float]) -> str:
    """Mean and each seed's."""
    return f"{mean(values):.1%} | {', '.join(f'{value:.1%}' for value in values)}" if values else "not run |"


def broken(found: Sequence[dict[str, float]]) -> list[str]:
    """Rows that say that a system does not learn, or that one frame tells the class."""
    wrong = []
    for row in found:
        name, top1 = f"{row['system']}, seed {row['seed']}", row["val/top1"]
        if row["system"] == BLIND and abs(top1 - CHANCE) > NEAR:
            wrong.append(f"{name}: {top1:.1%}, though one frame should tell nothing (chance {CHANCE:.1%})")
        if row["system"] != BLIND and top1 < LEARNED:
            wrong.append(f"{name}: {top1:.1%} is less than {LEARNED:.0%}")
    return wrong


def page(found: Sequence[dict[str, float]]) -> str:
    """The Markdown page."""
    lines = [
        "# Every system on generated clips",
        "",
        f"`python benchmarks/systems.py`, last run {max((str(row['date']) for row in found), default='-')}, "
        f"{cpu_facts()[0]}.",
        "",
        "240 steps (STM: 480) of 16 clips of 64x64 from random weights (`configs/demo.yaml` with the overrides in the",
        "script; OFF sees 112x112, because it reads gradients of maps an eighth as large as the picture), clips of",
        f"domain a, 80 validation clips, chance {CHANCE:.1%}. A clip's class is its motion: one frame does not tell",
        f"it, so that a TSN that sees one (`{BLIND}`) has to stay near chance, and the others must not. The last",
        "checkpoint counts; OFF's picture size was chosen by the validation clips of its seed 0 (56 % at 64x64), so",
        "read its row as that it can learn.",
        "",
        "| system | seeds | mean top-1 | each seed |",
        "|---|---|---|---|",
    ]
    for system in SYSTEMS:
        top1 = of(found, system, "val/top1")
        lines.append(f"| {system} | {len(top1)} | {each(top1)} |")
    lines += [
        "",
        "## To another domain",
        "",
        "Labels of domain a alone; top-1 on the validation clips of domain b (other colours, textures, shapes, noise,",
        "blur, camera). With DANN the discriminator's accuracy, of 50 % by chance, is that on training clips, while it",
        "learns them: the mean of the first 30 steps, the highest of 10, the mean of the last 30.",
        "",
        "| system | target top-1 | each seed | discriminator: first | highest | last |",
        "|---|---|---|---|---|---|",
    ]
    for system in ("i3d", "i3d-dann", "rev2net", "rev2net-dann"):
        told = [of(found, system, f"domain_{when}") for when in ("first", "highest", "last")]
        shown = [", ".join(f"{value:.0%}" for value in values) for values in told]
        lines.append(f"| {system} | {each(of(found, system, 'target/top1'))} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name starts so")
    parser.add_argument("--seed", type=int, choices=SEEDS, help="of this seed")
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    done = {(row["system"], row["seed"]) for row in rows(LOG)}
    seeds = SEEDS if args.seed is None else [args.seed]
    left = [(s, seed) for seed in seeds for s in SYSTEMS if (s, seed) not in done and s.startswith(args.only)]
    left = [] if args.page else left
    if left:
        prepare()
    keep(each_on_a_core(train, left), LOG, PAGE, page)
    wrong = broken(rows(LOG))
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
