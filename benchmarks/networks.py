"""What each network of the paper costs at test time: parameters, multiply-adds, clips per second.

    python benchmarks/networks.py --write benchmarks/networks.md

The configurations are those of Kinetics-400 and UCF101 in `configs/`, in full size with 400 classes. Multiply-adds are
counted by torch's FlopCounterMode; clips per second are medians of interleaved passes over one clip, bf16 on this CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch
from machine import cpu_facts, page_parser, publish
from torch.utils.flop_counter import FlopCounterMode

from rev2net.config import Config, load_config
from rev2net.evaluate import for_testing
from rev2net.models.build import build_encoder, build_network

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CLASSES, REPEATS = 400, 5


@dataclass(frozen=True)
class Row:
    """A network: its configuration, and what its publication says of it."""

    name: str
    config: str
    published: str


ROWS = (
    Row("TSN, RGB", "ucf101-imagenet/tsn-rgb", "24.3 M, 33 G (Lin et al. 2019, table 2)"),
    Row("TSN, flow", "ucf101-imagenet/tsn-flow", ""),
    Row("TSM, RGB", "kinetics400/tsm-rgb", "24.3 M, 33 G (Lin et al. 2019, table 2)"),
    Row("STM, RGB", "kinetics400/stm-rgb", "24.0 M, 33.3 G (as quoted for 174 classes)"),
    Row("OFF, RGB", "ucf101-imagenet/off-rgb", "on BN-Inception; no counts"),
    Row("ActionFlowNet", "ucf101-imagenet/actionflownet", "33.4 M, 40.7 G (torchvision, r3d_18)"),
    Row("I3D, RGB", "kinetics400/i3d-rgb", "12 M; 108 G at 64 frames"),
    Row("I3D, flow", "kinetics400/i3d-flow", ""),
    Row("Rev2Net", "kinetics400/rev2net", "that of I3D"),
)


def clip_of(config: Config, batch: int = 1) -> torch.Tensor:
    """A clip of the configured shape."""
    channels = {"rgb": 3, "flow": 2}[config.model.input]
    return torch.rand(batch, channels, config.data.frames, config.data.size, config.data.size) * 2 - 1


def gmacs(config: Config, *, training: bool) -> float:
    """10^9 multiply-adds of one clip's forward pass, of the test-time network or of everything that is trained."""
    with torch.device("meta"):
        network = build_network(config, CLASSES).eval()
        clip = clip_of(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.heads(clip) if training else network(clip)
    return counter.get_total_flops() / 2e9


def rates(configs: Sequence[Config]) -> list[float]:
    """Clips per second of each, medians of `REPEATS` passes taken in turns."""
    networks = [for_testing(build_encoder(config, CLASSES), torch.device("cpu")) for config in configs]
    clips = [clip_of(config).contiguous(memory_format=torch.channels_last_3d) for config in configs]
    seconds: list[list[float]] = [[] for _ in configs]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for repeat in range(-1, REPEATS):
            for network, clip, times in zip(networks, clips, seconds, strict=True):
                begin = time.perf_counter()
                network(clip)
                if repeat >= 0:
                    times.append(time.perf_counter() - begin)
    return [1 / median(times) for times in seconds]


def page() -> str:
    """The Markdown page."""
    configs = [load_config(CONFIGS / f"{row.config}.yaml", ["model.imagenet=null"]) for row in ROWS]
    lines = [
        "# What each network costs",
        "",
        f"`python benchmarks/networks.py --write benchmarks/networks.md`, {date.today()}, {cpu_facts()[0]}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads.",
        "",
        f"{CLASSES} classes; multiply-adds of one clip. In training Rev2Net and ActionFlowNet have decoders besides;",
        f"clips/s are those of the test-time network, bf16, one clip at a time, medians of {REPEATS}.",
        "",
        "| network | clip | parameters | GMACs | in training | published | clips/s | / I3D |",
        "|---|---|---|---|---|---|---|---|",
    ]
    speeds = rates(configs)
    i3d = speeds[[row.name for row in ROWS].index("I3D, RGB")]
    for row, config, speed in zip(ROWS, configs, speeds, strict=True):
        with torch.device("meta"):
            count = sum(p.numel() for p in build_encoder(config, CLASSES).parameters())
        data = config.data
        segments = f" in {data.segments} segments" if data.segments else ""
        lines.append(
            f"| {row.name} | {data.frames}x{data.size}x{data.size}{segments} | {count / 1e6:.2f} M | "
            f"{gmacs(config, training=False):.1f} | {gmacs(config, training=True):.1f} | {row.published} | "
            f"{speed:.2f} | {speed / i3d:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """See the module."""
    publish(page(), page_parser(__doc__).parse_args().write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
