"""What the engine and the process group need to know of the machine."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tiny import TINY

from dataloaders.errors import UserError
from rev2net.config import load_config
from rev2net.distributed import Ranks, computes_in_bf16, fair_threads
from rev2net.engine import Engine, TrainingStep, conv3d_warning, deepspeed_config, settle_precision
from rev2net.losses import Objective
from rev2net.models.build import build_network

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([("n1", {0, 1, 2, 3}), ("n1", {0, 1, 2, 3})], [2, 2]),  # all ranks see the whole machine
        ([("n1", {0, 1, 2, 3}), ("n1", {4, 5, 6, 7})], [4, 4]),  # each is bound to its own cores
        ([("n1", {0, 1}), ("n2", {0, 1})], [2, 2]),  # cores of two machines have the same numbers
        ([("n1", set(range(8)))] * 3, [2, 2, 2]),
        ([("n1", set(range(3)))] * 3, [1, 1, 1]),
        ([("n1", {0})] * 4, [1, 1, 1, 1]),
        ([("n1", {0, 1, 2, 3}), ("n1", {2, 3, 4, 5})], [3, 3]),
    ],
)
def test_a_core_is_shared_by_those_who_may_use_it(cores: list[tuple[str, set[int]]], threads: list[int]) -> None:
    assert [fair_threads(rank, cores) for rank in range(len(cores))] == threads


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "expected"),
    [
        ("2.8.0+cu128", 91002, "wrong results"),
        ("2.8.0+cu128", 90800, "wrong results"),
        ("2.8.0+cu126", 90501, None),
        ("2.9.1+cu128", 91002, "memory"),
        ("2.9.1+cu128", 91500, None),
        ("2.14.1", 91500, None),
        ("2.14.1+cpu", None, None),
    ],
)
def test_known_bad_convolutions(torch_version: str, cudnn: int | None, expected: str | None) -> None:
    warning = conv3d_warning(torch_version, cudnn)
    assert (warning is None) if expected is None else (warning is not None and expected in warning)


def test_bf16_is_for_processors_that_have_instructions_for_it() -> None:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("only x86's flags in /proc/cpuinfo are known to this test")
    flags = re.search(r"^flags\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags is not None
    assert computes_in_bf16(torch.device("cpu")) == ("avx512_bf16" in flags[1].split())


@pytest.mark.parametrize(
    ("given", "native", "elsewhere", "expected"),
    [
        ("auto", True, True, "bf16"),
        ("auto", False, True, "fp32"),
        ("auto", True, False, "fp32"),  # another rank's device does not
        ("fp32", True, True, "fp32"),
        ("bf16", False, True, "bf16"),
        ("bf16", True, True, "bf16"),
    ],
)
def test_auto_is_bf16_where_all_devices_compute_in_it(
    given: str, native: bool, elsewhere: bool, expected: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Devices of both kinds cannot be had on one machine: what they say of themselves is made up."""
    ranks = cast(Ranks, SimpleNamespace(first=True, device=ALONE.device, any=lambda flag: flag or not elsewhere))
    monkeypatch.setattr("rev2net.engine.computes_in_bf16", lambda device: native)
    config = load_config("configs/demo.yaml", [*TINY, f"train.precision={given}"])
    settled = settle_precision(config, ranks)
    assert settled.train.precision == expected
    assert settled.train.model_copy(update={"precision": given}) == config.train
    assert ("emulated" in caplog.text) == (given == "bf16" and not (native and elsewhere))


def test_keys_for_deepspeed_lie_over_ours_and_leave_the_others() -> None:
    def tree(keys: str) -> dict[str, object]:
        return deepspeed_config(
            load_config("configs/demo.yaml", [*TINY, "train.precision=fp32", f"train.deepspeed={keys}"]), ALONE, 5
        )

    assert tree("{zero_optimization: {overlap_comm: true}}")["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 5,
        "overlap_comm": True,
    }
    config = load_config("configs/demo.yaml", [*TINY, "train.precision=bf16"])
    # Gradients stay float32 between the ranks.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert deepspeed_config(config, ALONE, 5)["torch_autocast"] == autocast
    for keys, advice in (
        ("{zero_optimization: {stage: 3}}", "set train.zero_stage"),
        ("{train_batch_size: 4}", "train"),
    ):
        with pytest.raises(UserError, match=advice):
            tree(keys)


@pytest.mark.parametrize(("scale", "applied"), [(65536.0, True), (1.0, False)])
def test_an_overflow_under_fp16_is_the_scaler_s_until_scaling_cannot_be_the_reason(scale: float, applied: bool) -> None:
    """PyTorch's own scaler; of DeepSpeed only what its step does with it without ZeRO."""
    config = load_config("configs/demo.yaml", [*TINY, "train.precision=fp16", "train.zero_stage=0"])
    network = build_network(config, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    deepspeed = SimpleNamespace(
        torch_autocast_z0_gradscaler=scaler, optimizer=optimizer, step=step, was_step_applied=lambda: True
    )
    engine = Engine(
        deepspeed=deepspeed, step_module=TrainingStep(network, Objective(), 0.1), accumulation=1, config=config,
        ranks=ALONE, statistics={name: value.clone() for name, value in network.named_buffers()},
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for gradient, overflowed, goes_on in ((float("inf"), True, applied), (1.0, False, True)):
        scaler.scale(torch.zeros(()))
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        assert (engine.finish_step(), engine.overflowed) == (goes_on, overflowed)
        moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
        assert any(moved) is not overflowed
