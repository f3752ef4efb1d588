"""Clips by NVIDIA DALI: on a GPU (NVDEC, resize and flip there) or, for VP9, on the CPU.

There is one graph. The GPU's differs from the CPU's in two words, `mixed` for the decoders and `gpu` for what follows;
what a clip is comes in as data, so nothing random happens inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from torch.utils.dlpack import from_dlpack

from dataloaders.batch import ClipRequest, RawClips
from dataloaders.errors import DecodeError, UserError
from dataloaders.plan import flow_crop
from dataloaders.trim import trim

Feeds: TypeAlias = dict[str, list[npt.NDArray[Any]]]
"""Inputs of the graph by name, one array per clip."""

_NO_MEMORY = re.compile(r"out.of.memory|bad_alloc", re.IGNORECASE)
"""What DALI and PyTorch say where a GPU, or the machine, has none left."""

CPU_CODECS = ("vp8", "vp9", "mjpeg")
"""What `decoders.video` decodes without a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWords:
    """Where the decoders and the other operators of the graph run."""

    decoder: str
    operator: str


ON_CPU = DeviceWords(decoder="cpu", operator="cpu")
ON_GPU = DeviceWords(decoder="mixed", operator="gpu")


def check_codec(codec: str, device: torch.device) -> None:
    """Raise UserError where DALI cannot decode this codec on this device."""
    if device.type != "cuda" and codec not in CPU_CODECS:
        raise UserError(
            f"DALI decodes {codec} on a GPU only, and the loader's device is {device}; prepare the data set with "
            "--codec vp9 or set loader.backend=pyav"
        )


def clip_pipeline(
    *,
    words: DeviceWords,
    device_id: int | None,
    batch: int,
    threads: int,
    size: tuple[int, int],
    with_flow: bool,
    with_rgb: bool = True,
) -> Pipeline:
    """The graph, not yet built; its outputs are frames, with rgb, and the planes of u and v, with flow.

    Args:
        size: height and width of the clips.
    """
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1, seed=0)
    with pipeline:
        flip = _input("flip", types.INT32, 0)
        outputs = []
        if with_rgb:
            outputs += [_cut(_decoded("rgb", words), "crop", flip, words, size)]
        if with_flow:
            # Full-range flow with chroma 128 decodes to R = G = B = code; channel 0 is taken.
            stacked = _decoded("flow", words)
            outputs += [_cut(stacked, plane, flip, words, size) for plane in ("u", "v")]
        pipeline.set_outputs(*outputs)
    return pipeline


def _input(name: str, dtype: Any, ndim: int) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, device="cpu")


def _decoded(name: str, words: DeviceWords) -> Any:
    return fn.decoders.video(
        _input(name, types.UINT8, 1),
        name=f"{name}_decoder",
        device=words.decoder,
        frames=_input(f"{name}_frames", types.INT32, 1),
        pad_mode="none",
    )


def _cut(video: Any, name: str, flip: Any, words: DeviceWords, size: tuple[int, int]) -> Any:
    """Crop by the inputs `{name}_start` and `{name}_shape` (rows, columns, channels), resize, flip."""
    cut = fn.slice(
        video,
        start=_input(f"{name}_start", types.INT32, 1),
        shape=_input(f"{name}_shape", types.INT32, 1),
        axis_names="HWC",
        name=f"{name}_slice",
        device=words.operator,
    )
    resized = fn.resize(
        cut,
        size=list(size),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        name=f"{name}_resize",
        device=words.operator,
    )
    return fn.flip(resized, horizontal=flip, vertical=0, name=f"{name}_flip", device=words.operator)


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """One for all loaders: PyTorch keeps the memory that one stream has used from all others, for ever."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class DALIBackend:
    """One DALI pipeline; threads that call it take turns, after they have prepared what it is fed.

    Args:
        batch: most clips in one call.
        threads: DALI's own threads; on a GPU each decodes one clip at a time.
        number: of this pipeline among those of its loader.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        batch: int,
        threads: int,
        size: tuple[int, int],
        with_flow: bool,
        with_rgb: bool = True,
        number: int = 0,
    ) -> None:
        self._device = device
        self._with_rgb = with_rgb
        self._batch = batch
        self._threads = max(1, threads)
        self._size = size
        self._with_flow = with_flow
        on_gpu = device.type == "cuda"
        self._words = ON_GPU if on_gpu else ON_CPU
        self._device_id = (device.index or 0) if on_gpu else None
        self._turn = Lock()
        self._pipeline = self._fresh()
        self._stream = _stream(device, number) if on_gpu else None

    def _fresh(self) -> Any:
        pipeline = clip_pipeline(
            words=self._words,
            device_id=self._device_id,
            batch=self._batch,
            threads=self._threads,
            size=self._size,
            with_flow=self._with_flow,
            with_rgb=self._with_rgb,
        )
        pipeline.build()
        return pipeline

    def decode(self, requests: Sequence[ClipRequest]) -> RawClips:
        """See dataloaders.batch.Backend; a failing batch is decoded again clip by clip to find the culprit."""
        feeds = self._feeds(requests)
        with self._turn:
            try:
                return self._run(feeds)
            except RuntimeError as error:
                # After an error DALI calls the pipeline "no longer valid".
                self._pipeline = self._fresh()
                culprit = self._find_culprit(requests)
                if culprit is None:
                    raise RuntimeError(f"DALI decodes these clips one by one but not together: {error}") from error
                raise culprit from error

    def _feeds(self, requests: Sequence[ClipRequest]) -> Feeds:
        return _feeds(requests, with_flow=self._with_flow, with_rgb=self._with_rgb)

    def _find_culprit(self, requests: Sequence[ClipRequest]) -> DecodeError | None:
        for request in requests:
            try:
                self._run(self._feeds([request]))
            except RuntimeError as error:
                if _NO_MEMORY.search(str(error)):
                    raise  # which says nothing of the clip
                self._pipeline = self._fresh()
                return DecodeError(request.key, _reason(error))
        return None

    def _run(self, feeds: Feeds) -> RawClips:
        outputs = self._pipeline.run(**feeds)
        with self._on_its_stream():
            tensors = [self._tensor(output) for output in outputs]
            return RawClips(
                frames=tensors[0] if self._with_rgb else None,
                flow=torch.cat(tensors[-2:], dim=-1) if self._with_flow else None,
            )

    @contextmanager
    def _on_its_stream(self) -> Iterator[None]:
        """Whatever is made here is made on the pipeline's own stream, and is there when this ends.

        All of it: memory that is freed here is used again by the next batch in the order of this stream, which says
        nothing of what another one still reads. With the device, because a thread's is the first one otherwise.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def _tensor(self, output: Any) -> torch.Tensor:
        """A torch tensor on the same device; copied there, since DALI may use its memory again."""
        if self._stream is None:
            return torch.from_numpy(np.array(output.as_array()))
        return from_dlpack(output.as_tensor()).clone()

    def close(self) -> None:
        """Free the pipeline and its threads."""
        self._pipeline = None


class DecoderOnly:
    """DALI's decoder without what follows; its own speed, for `bench`."""

    def __init__(self, *, device: torch.device, batch: int, threads: int, with_flow: bool) -> None:
        on_gpu = device.type == "cuda"
        words = ON_GPU if on_gpu else ON_CPU
        self._names = ["rgb", "flow"] if with_flow else ["rgb"]
        self._pipeline = Pipeline(
            batch_size=batch,
            num_threads=max(1, threads),
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with self._pipeline:
            self._pipeline.set_outputs(*(_decoded(name, words) for name in self._names))
        self._pipeline.build()

    def decode(self, requests: Sequence[ClipRequest]) -> int:
        """Decode the clips' frames and drop them; the number of clips."""
        feeds = _feeds(requests, with_flow=len(self._names) == 2)
        names = {f"{name}{end}" for name in self._names for end in ("", "_frames")}
        self._pipeline.run(**{name: feed for name, feed in feeds.items() if name in names})
        return len(requests)


def _feeds(requests: Sequence[ClipRequest], *, with_flow: bool, with_rgb: bool = True) -> Feeds:
    names = ["flip"]
    if with_rgb:
        names += ["rgb", "rgb_frames", "crop_start", "crop_shape"]
    if with_flow:
        names += ["flow", "flow_frames", "u_start", "u_shape", "v_start", "v_shape"]
    feeds: Feeds = {name: [] for name in names}
    for request in requests:
        plan, info = request.plan, request.info
        feeds["flip"].append(np.array(plan.flip, np.int32))
        if with_rgb:
            assert request.rgb is not None
            _feed_video(feeds, "rgb", request.rgb, plan.frames, request)
            feeds["crop_start"].append(_ints((*plan.crop[:2], 0)))
            feeds["crop_shape"].append(_ints((*plan.crop[2:], 3)))
        if not with_flow:
            continue
        if request.flow is None or info.flow_height is None:
            raise DecodeError(request.key, "has no flow video")
        _feed_video(feeds, "flow", request.flow, plan.flow_frames, request)
        top, left, height, width = flow_crop(info, plan.crop)
        feeds["u_start"].append(_ints((top, left, 0)))
        feeds["v_start"].append(_ints((top + info.flow_height, left, 0)))
        for plane in ("u", "v"):
            feeds[f"{plane}_shape"].append(_ints((height, width, 1)))
    return feeds


def _feed_video(feeds: Feeds, name: str, data: bytes, frames: Sequence[int], request: ClipRequest) -> None:
    part, indices = trim(data, frames, request.info.fps, request.key)
    feeds[name].append(np.frombuffer(part, np.uint8))
    feeds[f"{name}_frames"].append(_ints(indices))


def _ints(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.asarray(values, np.int32)


def _reason(error: RuntimeError) -> str:
    """DALI's message without its account of where in the graph it happened."""
    message = str(error).rpartition("encountered:")[2].partition("C++ context")[0]
    return " ".join(message.split()) or str(error)
