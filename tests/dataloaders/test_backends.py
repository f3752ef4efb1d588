from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import av
import numpy as np
import nvidia.dali.backend
import pytest
import torch
from tiny_data import encode_codes, encode_rgb, pictures, smooth_flow

from dataloaders.batch import ClipRequest, RawClips, to_batch
from dataloaders.dali_backend import ON_CPU, ON_GPU, DALIBackend, DeviceWords, check_codec, clip_pipeline
from dataloaders.errors import DecodeError, UserError
from dataloaders.flow.codes import decode_flow, encode_flow
from dataloaders.plan import Augment, ClipPlan, ClipShape, train_plan
from dataloaders.pyav_backend import PyAVBackend, decode_pictures, to_luma, to_rgb
from dataloaders.shards import SampleInfo
from dataloaders.trim import trim
from dataloaders.video import Codec, VideoEncoder, VideoSource

CPU = torch.device("cpu")
SHAPE = ClipShape(frames=8, height=48, width=48)


def describe(key: str, count: int, size: tuple[int, int], flow: tuple[int, int] | None = None) -> SampleInfo:
    return SampleInfo(
        key=key,
        label=1,
        class_name="b",
        source="s",
        num_frames=count,
        fps=25.0,
        height=size[0],
        width=size[1],
        flow_height=flow[0] if flow else None,
        flow_width=flow[1] if flow else None,
    )


def generated(count: int, shape: ClipShape = SHAPE, size: tuple[int, int] = (64, 96)) -> list[ClipRequest]:
    """Requests for clips with half-size flow, each with a plan of its own."""
    flow_size = (size[0] // 2, size[1] // 2)
    requests = []
    for i in range(count):
        info = describe(f"clip{i}", 30, size, flow_size)
        flow = encode_flow(smooth_flow(30, *flow_size, seed=i))
        requests.append(
            ClipRequest(
                key=info.key,
                rgb=encode_rgb(pictures(30, *size, seed=i), "vp9"),
                flow=encode_codes(list(flow), "vp9"),
                info=info,
                plan=train_plan(info, shape, Augment(), seed=0, epoch=0, sample=i),
                shape=shape,
                sample=i,
            )
        )
    return requests


def run(requests: Sequence[ClipRequest], name: str, *, with_flow: bool) -> RawClips:
    shape = requests[0].shape
    if name == "pyav":
        pyav = PyAVBackend(workers=2)
        try:
            return pyav.decode(requests)
        finally:
            pyav.close()
    size = (shape.height, shape.width)
    return DALIBackend(device=CPU, batch=len(requests), threads=2, size=size, with_flow=with_flow).decode(requests)


def difference(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    assert a is not None and b is not None and a.shape == b.shape
    return (a.int() - b.int()).abs().float()


def test_p3_dali_and_pyav_agree_on_generated_clips() -> None:
    requests = generated(6)
    assert {request.plan.flip for request in requests} == {True, False}
    pyav, dali = (run(requests, name, with_flow=True) for name in ("pyav", "dali"))
    assert pyav.frames.shape == (6, 8, 48, 48, 3) and pyav.flow is not None and pyav.flow.shape == (6, 8, 48, 48, 2)
    assert difference(pyav.frames, dali.frames).mean() < 0.5
    assert difference(pyav.flow, dali.flow).mean() < 0.5
    assert difference(pyav.flow, dali.flow).max() <= 4


def test_p3_without_a_resize_they_agree_to_the_bit() -> None:
    """So all that is left between them is the rounding of two resizers."""
    requests = generated(2)
    plan = ClipPlan(frames=(3, 9, 9, 0, 29, 14, 13, 12), crop=(10, 30, 48, 48), flip=True)
    requests = [replace(r, plan=plan, info=replace(r.info, flow_height=None), flow=None) for r in requests]
    pyav, dali = (run(requests, name, with_flow=False) for name in ("pyav", "dali"))
    assert torch.equal(pyav.frames, dali.frames)


def test_p3_dali_and_pyav_agree_on_real_clips(shared_videos: Path) -> None:
    sets = ("kinetics400", "ucf101", "hmdb51", "skateboard")
    found = [sorted((shared_videos / name).rglob("*.*"))[0] for name in sets]
    shape = ClipShape(frames=8, height=112, width=112)
    requests = []
    for i, path in enumerate(found):
        with VideoSource(path) as source:
            decoded = [p for p, _ in zip(source.frames(176, 128, Fraction(25)), range(30), strict=False)]
        info = describe(path.name, len(decoded), (128, 176))
        plan = train_plan(info, shape, Augment(), seed=0, epoch=0, sample=i)
        rgb = _encode_i420(decoded)
        requests.append(ClipRequest(key=path.name, rgb=rgb, flow=None, info=info, plan=plan, shape=shape))
    pyav, dali = (run(requests, name, with_flow=False) for name in ("pyav", "dali"))
    per_clip = difference(pyav.frames, dali.frames).mean(dim=(1, 2, 3, 4))
    assert per_clip.max() < 1.0


def _encode_i420(decoded: list[Any]) -> bytes:
    encoder = VideoEncoder("vp9", "rgb", decoded[0].shape[1], decoded[0].shape[0] * 2 // 3, Fraction(25))
    for picture in decoded:
        encoder.add(picture)
    return encoder.finish()


@pytest.mark.parametrize("name", ["pyav", "dali"])
def test_colours_come_back_as_bt601_limited(name: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    frames = [np.full((48, 48, 3), colour, np.uint8) for colour in colours for _ in range(2)]
    info = describe("colours", 12, (48, 48))
    plan = ClipPlan(frames=tuple(range(1, 12, 2)), crop=(0, 0, 48, 48))
    shape = replace(SHAPE, frames=6)
    request = ClipRequest(key="k", rgb=encode_rgb(frames, "vp9"), flow=None, info=info, plan=plan, shape=shape)
    raw = run([request], name, with_flow=False)
    got = raw.frames[0].float().mean(dim=(1, 2))
    assert (got - torch.tensor(colours)).abs().max() < 8


@pytest.mark.parametrize("name", ["pyav", "dali"])
def test_all_flow_codes_come_back(name: str) -> None:
    """Every code from -20 to 20 pixels, in blocks of 16x16, through the encoder and the decoder."""
    codes = np.arange(1, 256, dtype=np.uint8)
    u = np.zeros((256, 256), np.uint8) + 128
    u.reshape(16, 16, 16, 16)[:] = np.append(codes, np.uint8(128)).reshape(16, 1, 16, 1)
    stacked = np.concatenate([u, u[::-1]])
    info = describe("codes", 8, (256, 256), (256, 256))
    plan = ClipPlan(frames=tuple(range(8)), crop=(0, 0, 256, 256))
    request = ClipRequest(
        key="k",
        rgb=encode_rgb([np.zeros((256, 256, 3), np.uint8)] * 8, "vp9"),
        flow=encode_codes([stacked] * 8, "vp9"),
        info=info,
        plan=plan,
        shape=ClipShape(frames=8, height=256, width=256),
    )
    flow = run([request], name, with_flow=True).flow
    assert flow is not None
    luma = decode_pictures(request.flow or b"", set(range(8)), 25.0, "k", to_luma, (512, 256))
    stored = np.stack([luma[i].reshape(2, 256, 256) for i in range(8)])
    assert np.array_equal(flow[0].permute(0, 3, 1, 2).numpy(), stored), "not what the bitstream holds"
    assert np.abs(stored[:, 0].astype(int) - u).mean() < 1


@pytest.mark.parametrize("codec", ["h264", "vp9"])
@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001), Fraction(10)])
def test_seeking_finds_the_very_frames(codec: Codec, fps: Fraction) -> None:
    data = encode_rgb(pictures(40, 48, 64, seed=0), codec, fps)
    with av.open(io.BytesIO(data)) as container:
        expected = [to_rgb()(frame) for frame in container.decode(video=0)]
    assert len(expected) == 40
    for wanted in ({0}, {11, 12, 13}, {12}, {23}, {24, 39}, {39}, set(range(40))):
        got = decode_pictures(data, wanted, float(fps), "k", to_rgb, (48, 64))
        assert got.keys() == wanted
        assert all(np.array_equal(got[i], expected[i]) for i in wanted)


@pytest.mark.parametrize("codec", ["h264", "vp9"])
@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)])
def test_a_trimmed_video_has_the_very_frames_and_little_else(codec: Codec, fps: Fraction) -> None:
    data = encode_rgb(pictures(60, 48, 64, seed=0), codec, fps)
    whole = decode_pictures(data, set(range(60)), float(fps), "k", to_rgb, (48, 64))
    for frames in ((24, 25, 30), (35, 12, 12), (59,), (0, 50), (3, 17, 31, 44, 58), tuple(range(60))):
        part, indices = trim(data, frames, float(fps), "k")
        sparse = decode_pictures(data, set(frames), float(fps), "k", to_rgb, (48, 64))
        assert all(np.array_equal(sparse[f], whole[f]) for f in frames)
        got = decode_pictures(part, set(indices), float(fps), "k", to_rgb, (48, 64))
        assert all(np.array_equal(got[i], whole[f]) for i, f in zip(indices, frames, strict=True))
        with av.open(io.BytesIO(part)) as container:
            kept = sum(1 for _ in container.decode(video=0))
        # Of each group of twelve the part up to its last wanted frame.
        groups = {frame // 12: max(f % 12 for f in frames if f // 12 == frame // 12) + 1 for frame in frames}
        assert kept == sum(groups.values())


@pytest.mark.parametrize("name", ["pyav", "dali"])
def test_flow_planes_do_not_bleed_into_each_other(name: str) -> None:
    flow = np.zeros((8, 2, 64, 64), np.float32)
    flow[:, 0], flow[:, 1] = 15.0, -15.0
    info = describe("k", 8, (64, 64), (64, 64))
    request = ClipRequest(
        key="k",
        rgb=encode_rgb([np.zeros((64, 64, 3), np.uint8)] * 8, "vp9"),
        flow=encode_codes(list(encode_flow(flow)), "vp9"),
        info=info,
        plan=ClipPlan(frames=tuple(range(8)), crop=(0, 0, 64, 64)),
        shape=ClipShape(frames=8, height=128, width=128),
    )
    codes = run([request], name, with_flow=True).flow
    assert codes is not None
    pixels = (codes.float() - 128) * 20 / 127
    assert (pixels[..., 0] - 15).abs().max() < 0.6 and (pixels[..., 1] + 15).abs().max() < 0.6


def test_flow_is_scaled_with_the_resize_and_negated_by_the_flip() -> None:
    (request,) = generated(1)
    plan = replace(request.plan, crop=(8, 16, 24, 32), flip=False)
    plain, flipped = (replace(request, plan=replace(plan, flip=flip)) for flip in (False, True))
    raw = run([plain, flipped], "pyav", with_flow=True)
    batch = to_batch(raw, [plain, flipped], CPU)
    assert batch.flow is not None and raw.flow is not None
    torch.testing.assert_close(batch.flow[1, 0].flip(-1), -batch.flow[0, 0])
    torch.testing.assert_close(batch.flow[1, 1].flip(-1), batch.flow[0, 1])
    torch.testing.assert_close(batch.video[1].flip(-1), batch.video[0])
    pixels = (raw.flow[0].float() - 128) * 20 / 127
    expected = torch.stack([pixels[..., 0] * 48 / 32, pixels[..., 1] * 48 / 24]).clamp(-20, 20) / 20
    torch.testing.assert_close(batch.flow[0], expected)


def test_flow_of_the_batch_is_the_stored_flow() -> None:
    """Numbers, end to end: encode, store, decode, cut; in units of 20 pixels."""
    flow = smooth_flow(30, 64, 96, seed=5)
    (request,) = generated(1)
    request = replace(
        request,
        flow=encode_codes(list(encode_flow(flow)), "h264"),
        info=replace(request.info, flow_height=64, flow_width=96),
        plan=ClipPlan(frames=tuple(range(5, 13)), crop=(8, 16, 48, 48)),
    )
    batch = to_batch(run([request], "pyav", with_flow=True), [request], CPU)
    assert batch.flow is not None
    expected = decode_flow(encode_flow(flow))[5:13, :, 8:56, 16:64].transpose(1, 0, 2, 3) / 20
    assert np.abs(batch.flow[0].numpy() - expected).mean() < 0.01


def test_a_backwards_clip_has_the_negated_flow_of_the_frame_before() -> None:
    (request,) = generated(1)
    forth = replace(request, plan=ClipPlan(frames=tuple(range(4, 12)), crop=(0, 0, 64, 64)))
    back = replace(request, plan=replace(forth.plan, frames=tuple(range(12, 4, -1)), backwards=True))
    batch = to_batch(run([forth, back], "pyav", with_flow=True), [forth, back], CPU)
    assert batch.flow is not None
    torch.testing.assert_close(batch.flow[1], -batch.flow[0].flip(1))
    torch.testing.assert_close(batch.video[1, :, 1:], batch.video[0, :, 1:].flip(1))


def test_a_batch_is_typed_and_normalised() -> None:
    requests = generated(2)
    batch = to_batch(run(requests, "pyav", with_flow=True), requests, CPU)
    assert batch.video.shape == (2, 3, 8, 48, 48) and batch.video.dtype == torch.float32
    assert -1 <= batch.video.min() < -0.5 and 0.5 < batch.video.max() <= 1
    assert batch.keys == ("clip0", "clip1") and batch.label.tolist() == [1, 1] and batch.sample.tolist() == [0, 1]
    assert batch.to("cpu", channels_last=False).video.is_contiguous()
    assert batch.to("cpu", channels_last=True).video.is_contiguous(memory_format=torch.channels_last_3d)


def test_colour_jitter_is_the_plans_matrix() -> None:
    requests = generated(3)
    strong = Augment(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3)
    jittered = [
        replace(r, plan=replace(r.plan, colour=train_plan(r.info, SHAPE, strong, seed=1, epoch=0, sample=i).colour))
        for i, r in enumerate(requests[:2])
    ] + requests[2:]
    raw = run(requests, "pyav", with_flow=False)
    video = to_batch(raw, jittered, CPU).video
    for i, request in enumerate(jittered):
        matrix = torch.tensor(request.plan.colour).reshape(3, 4)
        expected = (raw.frames[i].float() @ matrix[:, :3].T + matrix[:, 3]).clamp(0, 255) / 127.5 - 1
        torch.testing.assert_close(video[i], expected.permute(3, 0, 1, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(video[2], raw.frames[2].permute(3, 0, 1, 2).float() / 127.5 - 1)


BROKEN: dict[str, Callable[[ClipRequest], ClipRequest]] = {
    "garbage": lambda r: replace(r, rgb=b"no video" * 100),
    "empty": lambda r: replace(r, rgb=b""),
    "cut short": lambda r: replace(r, rgb=r.rgb[: len(r.rgb) // 2]),
    "missing frames": lambda r: replace(r, plan=replace(r.plan, frames=tuple(range(28, 36)))),
    "other size": lambda r: replace(r, plan=replace(r.plan, crop=(0, 0, 90, 90)), info=replace(r.info, height=90)),
    "flow garbage": lambda r: replace(r, flow=b"no video" * 100),
}


@pytest.mark.parametrize("name", ["pyav", "dali"])
def test_p8_the_culprit_of_a_batch_is_named(name: str) -> None:
    requests = generated(3)
    if name == "pyav":
        decoder: Any = PyAVBackend(workers=2)
    else:
        decoder = DALIBackend(device=CPU, batch=3, threads=2, size=(48, 48), with_flow=True)
    expected = decoder.decode(requests)
    for spoil in BROKEN.values():
        with pytest.raises(DecodeError) as caught:
            decoder.decode([requests[0], spoil(requests[1]), requests[2]])
        assert caught.value.key == "clip1" and caught.value.reason
        assert "dataloaders" not in caught.value.reason, "the reason is the decoder's, not a trace"
    assert torch.equal(decoder.decode(requests).frames, expected.frames), "it goes on after an error"
    decoder.close()


def test_p12_dali_without_a_gpu_says_what_to_do_about_h264() -> None:
    with pytest.raises(UserError, match=r"--codec vp9 or set loader\.backend=pyav"):
        check_codec("h264", CPU)
    check_codec("vp9", CPU)
    check_codec("h264", torch.device("cuda"))


def _graph(words: DeviceWords, device_id: int | None) -> dict[str, str]:
    """What DALI says about each operator (its kind, inputs, outputs, arguments), by name; built without a GPU."""
    pipeline = clip_pipeline(words=words, device_id=device_id, batch=4, threads=2, size=(112, 112), with_flow=True)
    pipeline._build_graph()
    return {operator.name: str(operator.spec) for operator in pipeline._ops}


def _without_devices(spec: str) -> list[str]:
    lines = [line.strip() for line in spec.splitlines() if "_origin_stack" not in line and "device:" not in line]
    return sorted(re.sub(r"_(cpu|gpu)$", "", line) for line in lines)


def test_the_gpu_graph_is_the_cpu_graph_but_for_the_device_words() -> None:
    cpu, gpu = _graph(ON_CPU, None), _graph(ON_GPU, 0)
    assert {name: _without_devices(spec) for name, spec in cpu.items()} == {
        name: _without_devices(spec) for name, spec in gpu.items()
    }
    dali_native: Any = nvidia.dali.backend
    registered = {
        "cpu": set(dali_native.RegisteredCPUOps()),
        "gpu": set(dali_native.RegisteredGPUOps()),
        "mixed": set(dali_native.RegisteredMixedOps()),
    }
    devices: dict[str, str] = {}
    for name, spec in gpu.items():
        kind, device = (re.findall(pattern, spec)[0] for pattern in (r"OpSpec for (\S+):", r"device: (\w+)"))
        assert kind in registered[device], f"DALI has no {kind} for {device} ({name})"
        devices[name] = device
    steps = {f"{plane}_{step}": "gpu" for plane in ("crop", "u", "v") for step in ("slice", "resize", "flip")}
    inputs = {f"{plane}_{end}": "cpu" for plane in ("crop", "u", "v") for end in ("start", "shape")}
    inputs.update(dict.fromkeys(("rgb", "rgb_frames", "flow", "flow_frames", "flip"), "cpu"))
    assert devices == {"rgb_decoder": "mixed", "flow_decoder": "mixed", **steps, **inputs}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_p3_the_gpu_agrees_with_pyav() -> None:
    requests = generated(4, size=(256, 256))
    cuda = torch.device("cuda", 0)
    dali = DALIBackend(device=cuda, batch=4, threads=4, size=(48, 48), with_flow=True).decode(requests)
    assert dali.frames.is_cuda and dali.flow is not None and dali.flow.is_cuda
    pyav = run(requests, "pyav", with_flow=True)
    assert difference(pyav.frames, dali.frames.cpu()).mean() < 2
    assert difference(pyav.flow, dali.flow.cpu()).mean() < 1


def test_p8_memory_that_a_gpu_lacks_is_no_fault_of_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's own pipeline cannot run out of a GPU's memory here: what it would raise is made up."""
    backend = DALIBackend(device=CPU, batch=2, threads=1, size=(64, 64), with_flow=False)
    monkeypatch.setattr(backend, "_run", Mock(side_effect=RuntimeError("CUDA allocation failed: out of memory")))
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        backend.decode(generated(2))
    assert not isinstance(raised.value, DecodeError)
