"""Time of one training step: I3D written plainly, our I3D, and Rev2Net with its decoders, on the CPU.

Everything is measured in one process, on one batch, in rounds (A B C ... A B C ...), so that a machine that slows down
slows every network alike. The page that is printed (and written with --write) is complete: machine, versions,
commit, command, numbers, and where Rev2Net's step spends its time.

    .venv/bin/python benchmarks/train_step.py --write benchmarks/train_step.md
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "5")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from machine import cpu_facts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from rev2net.losses import Objective
from rev2net.models import I3D, Rev2Net
from rev2net.models.i3d import Size3

CLASSES = 101
MATMUL = 4096
LAST = torch.channels_last_3d

PLAIN, OURS, BOTH = "(a) I3D, plain: fp32, contiguous", "(b) I3D: bf16, channels_last_3d", "(c) Rev2Net: DDP both"
NO_DDP, FLOW, FRAME = "(c') Rev2Net: DDP none", "(d) Rev2Net: flow decoder only", "(d) Rev2Net: frame decoder only"
NEITHER = "(d) Rev2Net: no decoder"
TEST_I3D, TEST_REV2NET = "(e) I3D, test-time forward", "(e) Rev2Net, test-time forward"
PRODUCT = f"(f) matrix product {MATMUL}³, bf16"

Run = Callable[[], object]


@dataclass
class Timings:
    """Seconds of one measured thing, run by run: by the clock, and of the processor over all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One clip, its flow and its label."""

    clip: Tensor
    flow: Tensor
    label: Tensor


def autocast(bf16: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


def make_batch(size: Size3, layout: torch.memory_format) -> Batch:
    draw = torch.Generator().manual_seed(0)
    clip, flow = (
        (torch.rand(1, channels, *size, generator=draw) * 2 - 1).contiguous(memory_format=layout) for channels in (3, 2)
    )
    return Batch(clip, flow, torch.tensor([7]))


def training_step(network: nn.Module, loss: Callable[[], Tensor], *, bf16: bool) -> Run:
    """Forward, loss, backward, SGD with momentum."""
    # A rate that trains nothing apart in a few steps: the numbers stay where they start.
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-5, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(bf16):
            value = loss()
        torch.autograd.backward(value)
        optimizer.step()
        if not value.isfinite():
            raise SystemExit(f"the loss became {value.item()}: this measures nothing")

    return step


def i3d_step(size: Size3, *, plain: bool) -> Run:
    """Plain is the same network and the same code, without autocast and without channels_last_3d."""
    batch = make_batch(size, torch.contiguous_format if plain else LAST)
    torch.manual_seed(0)
    network = I3D(CLASSES)
    return training_step(network, lambda: F.cross_entropy(network(batch.clip).float(), batch.label), bf16=not plain)


def rev2net_step(size: Size3, *, flow: bool = True, frame: bool = True, ddp: bool = True) -> Run:
    batch = make_batch(size, LAST)
    torch.manual_seed(0)
    network = Rev2Net(I3D(CLASSES), size, flow_decoder=flow, frame_decoder=frame)
    objective = Objective(ddp="both" if ddp and flow and frame else "none")
    draw = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        output = network.heads(batch.clip, draw)
        return objective(output, batch.label, batch.clip, batch.flow)["loss/total"]

    return training_step(network, loss, bf16=True)


def forward_only(size: Size3, *, rev2net: bool) -> Run:
    """As evaluation runs it: weights in channels_last_3d too, bf16, no gradient."""
    clip = make_batch(size, LAST).clip
    torch.manual_seed(0)
    encoder = I3D(CLASSES)
    network: nn.Module = Rev2Net(encoder, size) if rev2net else encoder
    network = network.to(memory_format=LAST).eval()

    def forward() -> None:
        with torch.inference_mode(), autocast(True):
            network(clip)

    return forward


def matrix_product() -> Run:
    a, b = (torch.randn(MATMUL, MATMUL, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    return lambda: a @ b


def subjects(size: Size3) -> dict[str, Run]:
    return {
        PLAIN: i3d_step(size, plain=True),
        OURS: i3d_step(size, plain=False),
        BOTH: rev2net_step(size),
        NO_DDP: rev2net_step(size, ddp=False),
        FLOW: rev2net_step(size, frame=False),
        FRAME: rev2net_step(size, flow=False),
        NEITHER: rev2net_step(size, flow=False, frame=False),
        TEST_I3D: forward_only(size, rev2net=False),
        TEST_REV2NET: forward_only(size, rev2net=True),
        PRODUCT: matrix_product(),
    }


def measure(runs: dict[str, Run], repeats: int) -> dict[str, Timings]:
    """`repeats` timed rounds after an untimed one, in which memory is touched and kernels are generated."""
    timings = {name: Timings() for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if round_number:
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
        print(f"round {round_number} of {repeats}", file=sys.stderr, flush=True)
    return timings


def forward_gmacs(size: Size3) -> dict[str, float]:
    """Multiply-adds of one forward pass, counted by torch on tensors without memory."""
    found = {}
    with torch.device("meta"):
        clip = torch.empty(1, 3, *size)
        for name, flow, frame in ((OURS, False, False), (FLOW, True, False), (FRAME, False, True), (BOTH, True, True)):
            network = Rev2Net(I3D(CLASSES), size, flow_decoder=flow, frame_decoder=frame)
            with FlopCounterMode(display=False) as counter:
                network.heads(clip)
            found[name] = counter.get_total_flops() / 2e9
    found[PLAIN] = found[NEITHER] = found[TEST_I3D] = found[TEST_REV2NET] = found[OURS]
    found[NO_DDP] = found[BOTH]
    found[PRODUCT] = MATMUL**3 / 1e9
    return found


def gflops(name: str, gmacs: dict[str, float]) -> float:
    """Two per multiply-add; a training step counts as three forward passes."""
    passes = 1 if name in (TEST_I3D, TEST_REV2NET, PRODUCT) else 3
    return 2 * passes * gmacs[name]


GROUPS: tuple[tuple[str, str], ...] = (
    (
        "copies, casts, format conversions",
        r"aten::(copy_|cat|stack|flip|clone|contiguous|_to_copy|to|constant_pad_nd)$",
    ),
    ("optimizer", r"Optimizer\."),
    ("convolutions, backward", r"aten::\w*convolution_backward\w*$"),
    ("convolutions, forward", r"aten::(conv|_conv|mkldnn_conv|slow_conv)\w*$"),
    ("batch norm", r"aten::\w*batch_norm\w*$"),
    ("pooling", r"aten::\w*pool[23]d\w*$"),
)
ELEMENTWISE, FRAMEWORK = "elementwise and reductions", "framework (autograd, Python, allocation)"


def group_of(chain: Sequence[str]) -> str:
    """Group of an operator: `chain` is its name, then its callers'.

    What the optimizer calls is the optimizer's; a copy is a copy whoever calls it; else the nearest caller that has
    a group decides (zeros that a pool's backward pass writes are pooling).
    """
    if any(name.startswith("Optimizer.") for name in chain):
        return "optimizer"
    for name in chain:
        for group, pattern in GROUPS:
            copies = group == GROUPS[0][0]
            if re.match(pattern, name) and (not copies or name == chain[0]):
                return group
    is_operator = chain[0].startswith("aten::") and not re.match(r"aten::(empty|as_strided|view|resize_)", chain[0])
    return ELEMENTWISE if is_operator else FRAMEWORK


def profiled(run: Run) -> tuple[dict[str, float], list[tuple[str, str, int, float]]]:
    """Seconds by group, and (operator, shapes, calls, seconds) of the most expensive, of one profiled run."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    groups: dict[str, float] = defaultdict(float)
    for event in recorded.events() or ():
        chain, caller = [event.name], event.cpu_parent
        while caller is not None:
            chain.append(caller.name)
            caller = caller.cpu_parent
        groups[group_of(chain)] += event.self_cpu_time_total / 1e6
    rows = []
    for entry in recorded.key_averages(group_by_input_shape=True):
        shapes = ", ".join("x".join(map(str, shape)) for shape in entry.input_shapes[:3] if shape)
        rows.append((entry.key, shapes, int(entry.count), entry.self_cpu_time_total / 1e6))
    return dict(groups), sorted(rows, key=lambda row: -row[3])[:15]


def output_of(*command: str) -> str:
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def header(args: argparse.Namespace, size: Size3, load: float) -> list[str]:
    model, flags = cpu_facts()
    changed = output_of("git", "status", "--porcelain", "--", "../rev2net", "train_step.py")
    commit = output_of("git", "rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    command = shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]])
    return [
        "# One training step on a CPU",
        "",
        "Forward, loss, backward and SGD-momentum step of one clip of "
        f"{'x'.join(map(str, size))}, {CLASSES} classes. Every network in one process, in turn.",
        "",
        f"- Machine: {model}, {os.cpu_count()} cores, {', '.join(flags) or 'no AVX2'}; {args.threads} threads; "
        f"load before the start {load:.2f}",
        f"- Versions: Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
        f"- Command: `{command}`",
        f"- Commit: {commit}",
        f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "",
    ]


def table(timings: dict[str, Timings], gmacs: dict[str, float]) -> list[str]:
    peak = gflops(PRODUCT, gmacs) / median(timings[PRODUCT].wall)
    lines = [
        f"Median, least and most of {len(timings[OURS].wall)} runs. CPU is processor time over all threads (median). "
        f"GFLOP: two per multiply-add of the forward pass, times three for a training step. "
        f"Share: of the rate of the matrix product; a little flattering, as the three passes include the stem's input "
        f"gradient, which nobody computes.",
        "",
        "| | median s | min s | max s | CPU s | GFLOP | GFLOP/s | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, timing in timings.items():
        middle, work = median(timing.wall), gflops(name, gmacs)
        lines.append(
            f"| {name} | {middle:.3f} | {min(timing.wall):.3f} | {max(timing.wall):.3f} | {median(timing.cpu):.3f} "
            f"| {work:.1f} | {work / middle:.0f} | {work / middle / peak:.0%} |"
        )
    return [*lines, ""]


def ratios(timings: dict[str, Timings]) -> list[str]:
    """The promises beside what was measured. Medians by the clock; in brackets the medians of processor time."""
    _, flags = cpu_facts()
    bf16 = bool({"avx512_bf16", "amx_bf16"} & set(flags))

    def row(what: str, above: str, below: str, promise: str, kept: Callable[[float], bool] | None) -> str:
        wall, cpu = (
            median(getattr(timings[above], of)) / median(getattr(timings[below], of)) for of in ("wall", "cpu")
        )
        verdict = "" if kept is None else "yes" if kept(wall) else "**no**"
        return f"| {what} | {wall:.2f} ({cpu:.2f}) | {promise} | {verdict} |"

    plain = "at least 2.0" if bf16 else "none without bf16 instructions"
    spread = max(max(timings[name].wall) / min(timings[name].wall) for name in (TEST_I3D, TEST_REV2NET))
    return [
        "Ratios of the medians, by the clock (and of processor time):",
        "",
        "| | ratio | promise | kept |",
        "|---|---|---|---|",
        row("(a) / (b): plain I3D to ours", PLAIN, OURS, plain, (lambda r: r >= 2.0) if bf16 else None),
        row("(c) / (b): Rev2Net to our I3D", BOTH, OURS, "at most 1.8, aim 1.6", lambda r: r <= 1.8),
        row("the same without DDP", NO_DDP, OURS, "", None),
        row("(d) / (b): flow decoder only", FLOW, OURS, "", None),
        row("(d) / (b): frame decoder only", FRAME, OURS, "", None),
        row("(d) / (b): no decoder", NEITHER, OURS, "1", None),
        row(
            "(e) Rev2Net to I3D at test time",
            TEST_REV2NET,
            TEST_I3D,
            f"1 within the spread of the runs ({spread:.2f})",
            lambda r: 1 / spread <= r <= spread,
        ),
        "",
    ]


def profile_page(groups: dict[str, float], rows: list[tuple[str, str, int, float]]) -> list[str]:
    total = sum(groups.values())
    lines = [
        "## Where Rev2Net's step (c) spends its time",
        "",
        f"One step under torch.profiler, {total:.2f} s in all.",
        "",
        "| group | s | share |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {s:.3f} | {s / total:.1%} |" for name, s in sorted(groups.items(), key=lambda item: -item[1])
    ]
    lines += [
        "",
        "The most expensive operators:",
        "",
        "| operator | shapes | calls | s | share |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {shapes} | {calls} | {s:.3f} | {s / total:.1%} |" for name, shapes, calls, s in rows]
    return [*lines, ""]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page here too")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return args


def main() -> None:
    args = parse()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    size: Size3 = (args.frames, args.size, args.size)
    runs = subjects(size)
    timings = measure(runs, args.repeats)
    page = header(args, size, load) + table(timings, forward_gmacs(size)) + ratios(timings)
    page += profile_page(*profiled(runs[BOTH]))
    text = "\n".join(page)
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
