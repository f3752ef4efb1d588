"""The paper's claim at small size: does learning flow and reversed frames help across domains? A row per training.

    python benchmarks/claims.py                        every run that claims.jsonl lacks, then the page
    python benchmarks/claims.py --only dann/a-b/i3d    runs whose name starts so
    python benchmarks/claims.py --page                 the page alone, from claims.jsonl

One training for each core, pinned to it; they differ in what the name says, and in precision where the processors do
(bf16 where they compute in it, else fp32). The real clips are looked for in ../shared. End it whenever you like: what
is finished has its row, what is not goes on from its checkpoint. A finished run is never repeated: remove its line
from claims.jsonl for that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cores import each_on_a_core
from machine import cpu_facts
from scipy import stats
from trainings import (
    ROOT,
    asked,
    by_precision,
    command,
    each_run,
    generated,
    keep,
    logged,
    precision,
    real,
    result_of,
    rows,
    without_absent,
)

from dataloaders.locks import lock
from rev2net.checkpoint import read_state

LOG, PAGE = ROOT / "benchmarks" / "claims.jsonl", ROOT / "benchmarks" / "claims.md"
WORK = ROOT / "runs" / "claims"

CLIPS, VAL_CLIPS, CLASSES = 48, 24, 8
"""Clips per class of each domain."""
STEPS = 480

CLIP = ("data.frames=8", "data.stride=2", f"train.duration={STEPS}steps")
TSN = ("model.name=tsn", "model.backbone=resnet18", "loss.ddp=none", "data.segments=3")
WIDTH = ("model.width=0.5",)
I3D = ("model.name=i3d", "loss.ddp=none", *WIDTH)
REV2NET = ("loss.ddp_low_from=160steps", *WIDTH)
NO_DDP = ("loss.ddp=none", *WIDTH)
FLOW_ALONE = ("model.frame_decoder=false", *NO_DDP)
FRAMES_ALONE = ("model.flow_decoder=false", *NO_DDP)
SYSTEMS: dict[str, tuple[str, ...]] = {
    "i3d": I3D,
    "rev2net": REV2NET,
    "no-ddp": NO_DDP,
    "no-frame": FLOW_ALONE,
    "no-flow": FRAMES_ALONE,
    "i3d-flow": (*I3D, "model.input=flow"),
    "tsn": (*TSN, "data.frames=3", "data.stride=1"),
    "tsn-flow": (*TSN, "model.input=flow", "data.frames=15", "data.stride=1"),
}


def weights(factor: float) -> tuple[str, ...]:
    """The paper's loss weights (0.01, 0.1, 0.1, 0.1), all multiplied."""
    return tuple(
        f"loss.{name}={value * factor:g}"
        for name, value in (("alpha", 0.01), ("beta", 0.1), ("lambda_flow", 0.1), ("lambda_im", 0.1))
    )


VARIED: dict[str, tuple[str, tuple[str, ...]]] = {
    "tenth": ("all weights a tenth", (*REV2NET, *weights(0.1))),
    "hundredth": ("all weights a hundredth", (*REV2NET, *weights(0.01))),
    "rms": ("reconstructions by rms, which divides them by about 300", (*REV2NET, "loss.reduction=rms")),
    "decoded": ("the decoders learn from the target too", (*REV2NET, "target.decode=true")),
    "no-ddp-decoded": ("the decoders learn from the target too, without DDP", (*NO_DDP, "target.decode=true")),
    "frame-decoded": ("frame decoder alone, on the target too", (*FRAMES_ALONE, "target.decode=true")),
    "flow-decoded": ("flow decoder alone, on the target too", (*FLOW_ALONE, "target.decode=true")),
    "flow-decoded-tenth": (
        "flow decoder alone, on the target too, weight a tenth",
        (*FLOW_ALONE, "target.decode=true", *weights(0.1)),
    ),
    "flow-decoded-no-skip": (
        "flow decoder alone, on the target too, without Conv3d_2c",
        (*FLOW_ALONE, "target.decode=true", "model.decoder_skip=none"),
    ),
    "thin": ("decoders of 8 channels, not 32", (*REV2NET, "model.decoder_channels=8")),
    "thick": ("decoders of 128 channels, not 32", (*REV2NET, "model.decoder_channels=128")),
    "flow-skip": ("the flow decoder alone reads Conv3d_2c", (*REV2NET, "model.decoder_skip=flow")),
    "no-skip": ("no decoder reads Conv3d_2c", (*REV2NET, "model.decoder_skip=none")),
    "no-noise": ("no noise in the latents", (*REV2NET, "model.latent_noise=false")),
    "fading": ("all weights fall to nothing over the second half", (*REV2NET, "loss.fade_from=240steps")),
    "plain-colours": (
        "no change of brightness, contrast, saturation",
        (*REV2NET, "augment.brightness=0", "augment.contrast=0", "augment.saturation=0"),
    ),
}
"""One thing at a time changed in Rev2Net: what it is, and the overrides."""
SYSTEMS |= {name: overrides for name, (_, overrides) in VARIED.items()}

ON_THE_TARGET = {
    "decoded": "rev2net",
    "no-ddp-decoded": "no-ddp",
    "frame-decoded": "no-flow",
    "flow-decoded": "no-frame",
}
"""Systems whose decoders learn from the unlabelled target too, and the same where they do not."""

LONG = {"i3d-long": "i3d", "rev2net-long": "rev2net", "flow-decoded-long": "flow-decoded"}
"""The same in twice the steps."""
SYSTEMS |= {long: (*SYSTEMS[name], f"train.duration={2 * STEPS}steps") for long, name in LONG.items()}

FUSED = {"i3d-both": ("i3d", "i3d-flow"), "tsn-both": ("tsn", "tsn-flow")}
"""Two streams, of RGB and of flow, whose softmax scores are averaged."""
SHOWN = {
    "i3d": "I3D", "rev2net": "Rev2Net", "no-ddp": "Rev2Net without DDP", "no-frame": "without frame decoder",
    "no-flow": "without flow decoder", "i3d-flow": "I3D, flow", "tsn": "TSN, RGB", "tsn-flow": "TSN, flow",
    "i3d-both": "I3D, RGB + flow", "tsn-both": "TSN, RGB + flow",
    **{name: what for name, (what, _) in VARIED.items()},
}  # fmt: skip
SHOWN |= {long: f"{SHOWN[name]}, {2 * STEPS} steps" for long, name in LONG.items()}

DIRECTIONS = ("a-b", "b-a")
REAL = {"skateboard": "46 validation clips, of which 63 % are of one of the two classes"}
MAIN = ("i3d", "rev2net", "no-ddp")
RECIPE = "flow-decoded"
"""Of the systems run in seeds 0 to 2 when it was chosen, the one with the highest mean on the targets."""
FEWEST = 5
"""Pairs that are enough to say something."""
FRESH_SEEDS, FRESH_CLIPS = range(5, 10), ("--seed", "1")
ABLATED = (*MAIN, "no-frame", "no-flow")


@dataclass(frozen=True)
class Run:
    """One training, or one test of two streams.

    Attributes:
        form: dann (labels of one domain, unlabelled clips of the other), fresh (the same on other clips), plain (no
            DANN), real.
        task: a-b is domain a with labels and b as the target; or a set of real clips.
    """

    form: str
    task: str
    system: str
    seed: int

    @property
    def name(self) -> str:
        """As in claims.jsonl."""
        return f"{self.form}/{self.task}/{self.system}/{self.seed}"

    @property
    def output(self) -> Path:
        """The training's folder."""
        return WORK / self.name.replace("/", "-")

    def data(self, name: str) -> Path:
        """The prepared clips of a domain or set."""
        return WORK / (f"{name}-fresh" if self.form == "fresh" else name)

    def of(self, system: str) -> Run:
        """The same of another system."""
        return Run(self.form, self.task, system, self.seed)


def plan() -> list[Run]:
    """All runs, the ones that matter most first."""

    def block(form: str, tasks: Sequence[str], systems: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        return [Run(form, task, system, seed) for seed in seeds for task in tasks for system in systems]

    return [
        *block("dann", DIRECTIONS, MAIN, range(3)),
        *block("dann", DIRECTIONS, MAIN, range(3, 5)),
        *block("dann", DIRECTIONS, ("no-frame", "no-flow"), range(3)),
        *block("plain", ("a-b",), (*ABLATED, RECIPE), range(3)),
        *block("plain", ("b-a",), ("i3d", RECIPE), range(3)),
        *block("dann", DIRECTIONS, ("i3d-flow", "i3d-both", "tsn-flow"), range(3)),
        *block("dann", DIRECTIONS, ("tsn", "tsn-both"), range(1)),
        *block("real", tuple(REAL), MAIN, range(3)),
        *block("dann", DIRECTIONS, tuple(ON_THE_TARGET), range(3)),
        # One seed, to see which of them matter at all.
        *block("dann", DIRECTIONS, [name for name in VARIED if name not in ON_THE_TARGET], range(1)),
        *block("fresh", DIRECTIONS, ("i3d", RECIPE), FRESH_SEEDS),
        *block("dann", DIRECTIONS, tuple(LONG), range(1)),
    ]


def prepare(runs: Sequence[Run]) -> None:
    """Render and prepare what the runs need, once."""
    counts = ("--clips-per-class", str(CLIPS), "--val-per-class", str(VAL_CLIPS))
    needed = {run.data(name): (name, run.form) for run in runs for name in run.task.split("-")}
    for data, (name, form) in needed.items():
        if form == "real":
            real(name, data)
        else:
            seed = FRESH_CLIPS if form == "fresh" else ()
            generated(data.with_name(f"clips-{data.name}"), data, "--domain", name, *counts, *seed)


def trained(run: Run) -> None:
    """Train, unless it is done; another process that needs the same training waits for it."""
    if run.form == "real":
        config, words = "configs/weizmann.yaml", [f"data.path={run.data(run.task)}"]
    else:
        source, target = map(run.data, run.task.split("-"))
        config, words = "configs/demo.yaml", [f"data.path={source}", f"target.path={target}", *CLIP]
        words.append(f"target.adapt={str(run.form != 'plain').lower()}")
    words += [f"output={run.output}", f"train.seed={run.seed}", *SYSTEMS[run.system]]
    with lock(run.output):
        command("rev2net", "train", config, *words, log=run.output.with_suffix(".log"))


def seconds_of(run: Run) -> float:
    """The time that its steps took, over all its starts."""
    every = read_state(Path(result_of(run.output)["checkpoint"])).config["train"]["log_every"]
    return float(every * sum(logged(run.output, "step_seconds")))


def fused(run: Run) -> dict[str, object]:
    """Accuracy of two streams on the target, both trained for it if need be, and that of each."""
    streams = [run.of(system) for system in FUSED[run.system]]
    for stream in streams:
        trained(stream)
    rgb, flow = (stream.output for stream in streams)
    scores = run.output.with_suffix(".json")
    target = run.data(run.task.split("-")[1])
    command("rev2net", "eval", rgb, target, "--fuse", flow, "--views", "1x1", "--json", scores,
            log=run.output.with_suffix(".log"))  # fmt: skip
    results = [result_of(stream.output) for stream in streams]
    alone = {name: round(r["metrics"]["target/top1"], 4) for name, r in zip(("rgb", "flow"), results, strict=True)}
    (computed,) = {precision(r["checkpoint"]) for r in results}
    row = {"target": round(json.loads(scores.read_text())["top1"], 4), **alone, "precision": computed}
    kept = {row["run"]: row for row in rows(LOG)}
    # On another machine a stream that has its row is trained again, and need not come out the same.
    again = [s for s, value in zip(streams, alone.values(), strict=True) if kept.get(s.name, {}).get("target") != value]
    return row | {"seconds": round(sum(map(seconds_of, again)))} if again else row


def done(run: Run) -> dict[str, object]:
    """Its row."""
    started = time.perf_counter()
    row: dict[str, object] = {"run": run.name, "date": str(date.today()), "processor": cpu_facts()[0]}
    if run.system in FUSED:
        return row | fused(run)
    trained(run)
    result = result_of(run.output)
    metrics = result["metrics"]
    row["seconds"] = round(max(time.perf_counter() - started, seconds_of(run)))
    row |= {"steps": result["step"], "source": metrics["val/top1"], "precision": precision(result["checkpoint"])}
    names = {"target": "target/top1", "flow_rmse": "val/flow_rmse", "frame_rmse": "val/frame_rmse"}
    row |= {short: metrics[name] for short, name in names.items() if name in metrics}
    for short, name in (("ce", "loss/ce"), ("discriminator", "domain/accuracy")):
        if values := logged(run.output, name):
            row[short] = mean(values[-3:])  # of 30 steps
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


Found = Sequence[dict[str, Any]]


def by_seed(found: Found, start: str, key: str) -> dict[int, float]:
    """A value of each seed of the runs of one name."""
    return {
        int(row["run"].split("/")[-1]): row[key] for row in found if row["run"].startswith(f"{start}/") and key in row
    }


def spread(values: Sequence[float]) -> str:
    """Mean and standard error, in points."""
    if not values:
        return "not run"
    error = f" ± {100 * stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{error}"


def differences(found: Found, one: str, other: str, form: str, other_form: str | None = None) -> dict[str, list[float]]:
    """`one` less `other` (of another form, if so said) on the target, paired by seed, of each direction."""
    paired = {}
    for task in DIRECTIONS:
        ours = by_seed(found, f"{form}/{task}/{one}", "target")
        theirs = by_seed(found, f"{other_form or form}/{task}/{other}", "target")
        paired[task] = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return paired


def together(paired: Mapping[str, Sequence[float]]) -> list[float]:
    """The differences of all directions."""
    return [difference for each in paired.values() for difference in each]


def comparisons(found: Found, pairs: Sequence[tuple[str, str]], form: str = "dann") -> list[str]:
    """A line per pair of systems that both were run: their paired differences, and what these say."""
    return compared((f"{SHOWN[one]} less {SHOWN[other]}", differences(found, one, other, form)) for one, other in pairs)


def compared(named: Iterable[tuple[str, Mapping[str, Sequence[float]]]]) -> list[str]:
    """A line for each of the paired differences that there are."""
    lines = []
    for name, paired in named:
        if whole := together(paired):
            each = " | ".join(spread(paired[task]) for task in DIRECTIONS)
            lines.append(f"| {name} | {spread(whole)} | {each} | {len(whole)} | {verdict(whole)} |")
    titles = " | ".join(map(shown_task, DIRECTIONS))
    return [f"| | points | {titles} | pairs | which says |", "|---|---|---|---|---|---|", *lines, ""] if lines else []


def shown_task(task: str) -> str:
    """A direction as the page has it."""
    return task.replace("-", " → ")


def verdict(paired: Sequence[float]) -> str:
    """What paired differences say: Student's interval of their mean."""
    if len(paired) < FEWEST:
        return f"{len(paired)} {'pair' if len(paired) == 1 else 'pairs'}, which is too few to say"
    if abs(mean(paired)) <= stats.t.ppf(0.975, len(paired) - 1) * stdev(paired) / len(paired) ** 0.5:
        return "no difference beyond the 95 % interval"
    return f"{'ahead' if mean(paired) > 0 else 'behind'}, beyond the 95 % interval"


def table(found: Found, form: str, tasks: Sequence[str], systems: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A line per system, a column per task and value."""
    columns = [(task, key) for task in tasks for key in keys]
    titles = [f"{shown_task(task)}: {key}" for task, key in columns]
    lines = [f"| | {' | '.join(titles)} | seeds |", "|" + "---|" * (len(columns) + 2)]
    for system in systems:
        values = [by_seed(found, f"{form}/{task}/{system}", key) for task, key in columns]
        cells = [
            f"{mean(v.values()):.2f}" if key == "ce" and v else spread(list(v.values()))
            for v, (_, key) in zip(values, columns, strict=True)
        ]
        seeds = "/".join(str(len(by_seed(found, f"{form}/{task}/{system}", keys[0]))) for task in tasks)
        lines.append(f"| {SHOWN[system]} | {' | '.join(cells)} | {seeds} |")
    return [*lines, ""]


def computed_in(found: Found, form: str) -> str:
    """How many trainings of a form were made in which precision."""
    return by_precision(
        row for row in found if row["run"].startswith(f"{form}/") and {"steps", "precision"} <= row.keys()
    )


def setup(found: Found) -> list[str]:
    """What was run, what it cost, and how it differs from the paper."""
    trainings = [row for row in found if "steps" in row]
    hours = sum(row.get("seconds", 0) for row in found) / 3600
    seeds = len({row["run"].split("/")[-1] for row in found})
    forms = {"dann": "with DANN", "plain": "without DANN", "fresh": "the recipe's fresh ones", "real": "of real clips"}
    computed = "; ".join(f"{what} {told}" for form, what in forms.items() if (told := computed_in(found, form)))
    latest = max((row["date"] for row in found), default="-")
    return [
        f"Generated by `make claims` from `claims.jsonl`, last run {latest}: {len(trainings)} of "
        f"{sum(run.system not in FUSED for run in plan())} trainings, {seeds} seeds, {hours:.1f} hours of one core, "
        "less some of what interrupted ones had done before.",
        "",
        f"The clips are generated (`rev2net synth`): {CLASSES} classes of motion, {CLASSES * CLIPS} training and "
        f"{CLASSES * VAL_CLIPS} validation clips of each domain. The domains differ in colours, textures, shapes, "
        f"noise, blur and camera. Chance is {1 / CLASSES:.1%}. Every run is `configs/demo.yaml` with the overrides of "
        f"`benchmarks/claims.py`, {STEPS} steps, the last checkpoint. Accuracies are top-1 in percent, mean ± standard "
        "error over seeds. They choose nothing but the recipe that is then tried on other seeds and other clips. What "
        "a difference says is Student's 95 % interval of its pairs, of both directions together; of so many intervals "
        "some exclude zero by chance.",
        "",
        "Deviations from the paper:",
        "",
        "- Generated clips of 8 frames of 64x64 (of 16, every second one), not UCF101 and HMDB51 at 32x224x224.",
        "- An I3D of half the width (3.1 million weights), so that a run takes about ten minutes of one core.",
        "- Weights from scratch, not from ImageNet or Kinetics; AdamW and a short schedule, not SGD; one view; dropout "
        "0.2; brightness, contrast and saturation are jittered.",
        f"- Precision is what the processor computes in. Trainings {computed or '(none yet)'}.",
        "- The low-level penalty is the root mean square of the decoders' difference, not equation 1's norm, and "
        "begins after a third of the steps; decoders learn at four times the rate, begin at no motion and with their "
        "foreground in front (`docs/decisions.md` says why).",
        "- The paper's weights of the losses (0.01, 0.1, 0.1, 0.1), without a search at this size.",
        "- DANN, which the paper cites, not the matching of mean embeddings that its section 3 speaks of; its weight "
        "is 0.1 (the paper gives none). TSN stands on a ResNet-18.",
        "- Not run: TSM, STM, OFF and ActionFlowNet, two streams within a domain, Tables 3 and 4.",
        "- No flips, nor runs that vary them: left and right are classes here.",
        "",
    ]


def in_short(found: Found) -> list[str]:
    """What came out for the paper's objective, and for the recipe."""
    ours = f"The recipe ({SHOWN[RECIPE]}), on fresh clips and seeds"
    paper = "Rev2Net (the paper's weights; low-level penalty by root mean square, delayed)"
    lines = []
    for one, form, what in (("rev2net", "dann", paper), (RECIPE, "fresh", ours)):
        paired = differences(found, one, "i3d", form)
        if not (whole := together(paired)):
            continue
        apart = ", ".join(f"{shown_task(task)} {spread(paired[task])}" for task in DIRECTIONS)
        losses = [[by_seed(found, f"{form}/{task}/{s}", "ce").values() for task in DIRECTIONS] for s in (one, "i3d")]
        ends = [" and ".join(f"{mean(values):.2f}" for values in each if values) for each in losses]
        lines.append(
            f"- {what}, less I3D on the other domain: **{spread(whole)} points** of {len(whole)} pairs ({apart}): "
            f"{verdict(whole)}. Training loss at the end {ends[0]}, I3D's {ends[1]}."
        )
    return [*lines, ""] if lines else []


def of_streams(found: Found) -> list[dict[str, Any]]:
    """The accuracies inside the rows of two streams, and of flow alone where it has no other, in the form `fused`."""
    made = []
    flows, runs = {flow for _, flow in FUSED.values()}, {row["run"] for row in found}
    for row in found:
        _, task, system, seed = row["run"].split("/")
        if system in flows and row["run"].replace("-flow/", "-both/") not in runs:
            made.append({**row, "run": f"fused/{task}/{system}/{seed}"})
        if system not in FUSED:
            continue
        for name, key in zip((*FUSED[system], system), ("rgb", "flow", "target"), strict=True):
            if key in row:
                made.append({**row, "run": f"fused/{task}/{name}/{seed}", "target": row[key]})
    return made


def inputs(found: Found) -> list[str]:
    """Table 1's form."""
    streams = of_streams(found)
    computed = by_precision(row for row in found if row["run"].split("/")[2] in FUSED and "precision" in row)
    lines = ["## Inputs across domains, with DANN (Table 1)", ""]
    lines += [
        f"Both streams and their mean, tested together ({computed or 'none yet'}). TSN on RGB sees three single "
        "frames, and the clips are made so that none tells the class: one seed.",
        "",
    ]
    systems = [name for both in FUSED for name in (*FUSED[both], both)]
    lines += table(streams, "fused", DIRECTIONS, systems, ("target",))
    shown = [("i3d-both", "i3d"), ("i3d-both", "i3d-flow"), ("i3d-flow", "i3d")]
    lines += comparisons(streams, shown, "fused")
    again = differences([*found, *streams], "i3d", "i3d", "fused", "dann")
    if together(again):
        lines += [
            "The trainings on RGB, of the same seeds, have their rows in the first table too. On another processor and "
            "in its precision they come out otherwise:",
            "",
        ]
        lines += compared([("I3D on RGB, made again, less its row above", again)])
    return lines


def page(found: Found) -> str:
    """The Markdown page."""
    lines = ["# The paper's claim, at small size", "", *in_short(found), *setup(found)]
    lines += ["## Across domains with DANN (the paper's Table 5)", ""]
    lines += ["`ce` is the training loss at the end, which says whether runs that are compared have converged.", ""]
    lines += table(found, "dann", DIRECTIONS, ABLATED, ("target", "source", "ce"))
    lines += ["Paired differences on the target, over seeds and both directions:", ""]
    against_i3d = [(system, "i3d") for system in ABLATED if system != "i3d"]
    lines += comparisons(found, [*against_i3d, ("rev2net", "no-ddp")])
    lines += ["## Within a domain (Table 2)", ""]
    lines += ["Without DANN; the target is tested all the same.", ""]
    lines += table(found, "plain", ("a-b",), ABLATED, ("source", "target", "ce"))
    lines += ["## Across domains without DANN", ""]
    with_it, without = (computed_in(found, form) or "none" for form in ("dann", "plain"))
    lines += [f"Differences to runs with DANN ({with_it}) are differences of precision too (here {without}).", ""]
    lines += table(found, "plain", DIRECTIONS, ("i3d", RECIPE), ("target", "source", "ce"))
    dann = [(f"{SHOWN[system]}, with DANN less without", differences(found, system, system, "dann", "plain"))
            for system in (*ABLATED, RECIPE)]  # fmt: skip
    recipe = ((f"{SHOWN[RECIPE]} ({form} DANN) less I3D without", differences(found, RECIPE, "i3d", of, "plain"))
              for form, of in (("without", "plain"), ("with", "dann")))  # fmt: skip
    alike = [row for row in (*found, *of_streams(found)) if row.get("precision") == "fp32"]
    i3d = "I3D, both in fp32 (with DANN the trainings of Table 1), with DANN less without"
    lines += compared([*dann, (i3d, differences(alike, "i3d", "i3d", "fused", "plain")), *recipe])
    lines += inputs(found)
    lines += ["## Real clips, within their set", ""]
    sets = "; ".join(f"{name}: {facts}" for name, facts in REAL.items())
    lines += [f"`configs/weizmann.yaml`, at half the width too. {sets}.", ""]
    lines += ["Weizmann, whose 12 validation clips tell no system from another: [accuracy](accuracy.md).", ""]
    lines += table(found, "real", tuple(REAL), MAIN, ("source",))
    lines += ["## One thing changed in Rev2Net, with DANN", ""]
    lines += table(found, "dann", DIRECTIONS, ("rev2net", *VARIED), ("target", "source", "ce"))
    lines += comparisons(found, [(system, other) for system in VARIED for other in ("rev2net", "i3d")])
    lines += ["## What the decoders learn from: both domains' clips, or the labelled ones alone", ""]
    lines += comparisons(found, list(ON_THE_TARGET.items()))
    lines += ["## The recipe, on clips and seeds that the search never used", ""]
    lines += [
        f"Of the systems that had been run in seeds 0 to 2, `{RECIPE}` ({SHOWN[RECIPE]}) had the highest mean on the "
        f"targets. It was trained anew beside I3D, with seeds {FRESH_SEEDS[0]} to {FRESH_SEEDS[-1]}, on clips of "
        f"`rev2net synth {' '.join(FRESH_CLIPS)}`:",
        "",
    ]
    lines += table(found, "fresh", DIRECTIONS, ("i3d", RECIPE), ("target", "source", "ce"))
    lines += comparisons(found, [(RECIPE, "i3d")], "fresh")
    lines += ["## The same in twice the steps", ""]
    lines += table(found, "dann", DIRECTIONS, tuple(LONG), ("target", "source", "ce"))
    lines += comparisons(found, [(system, "i3d-long") for system in LONG if system != "i3d-long"])
    lines += ["## Each run", ""]
    return "\n".join([*lines, *each_run(found)]) + "\n"


def main() -> int:
    """See the module."""
    left = without_absent(asked(__doc__, plan(), LOG), lambda run: run.task if run.form == "real" else None)
    prepare(left)
    keep(each_on_a_core(done, left), LOG, PAGE, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
