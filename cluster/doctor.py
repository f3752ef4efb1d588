"""Is this machine fit for training? Versions, codecs, all-reduce and storage within a minute.

Each check does the real thing at a small size: it imports, encodes, decodes, reduces, reads. Run so far on a machine
without GPUs; the GPU rows (NVDEC, NCCL) follow the same code but have not been seen on one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from dataloaders.errors import UserError
from dataloaders.workers import cores

State = Literal["ok", "warn", "FAIL"]

_PACKAGES = {
    "torch": "torch",
    "deepspeed": "deepspeed",
    "DALI": "nvidia.dali",
    "webdataset": "webdataset",
    "mlflow": "mlflow",
    "submitit": "submitit",
    "PyAV": "av",
    "numba": "numba",
}
_ENCODERS = {
    # codec: (FFmpeg encoder, container, options that keep it quiet)
    "h264": ("libx264", "mp4", {}),
    "hevc": ("libx265", "mp4", {"x265-params": "log-level=none"}),
    "vp8": ("libvpx", "webm", {}),
    "vp9": ("libvpx-vp9", "mp4", {}),
    # No AV1: as root libsvtav1 gives the process real-time priority, and two of them on two cores starved a machine.
    "mjpeg": ("mjpeg", "mp4", {}),
    "mpeg4": ("mpeg4", "mp4", {}),
}
_FRAMES, _SIDE = 4, 256  # NVDEC refuses sides below 128 (VP9) and 144 (HEVC).
_REDUCE_BYTES = (1 << 20, 1 << 24, 1 << 26)
_REDUCE_TIMEOUT = timedelta(seconds=60)
_STORAGE_SECONDS = 5.0
_STORAGE_BYTES = 1 << 30
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report; `FAIL` means that training cannot work here."""

    name: str
    state: State
    text: str


def diagnose(*, processes: int | None, storage: Path | None) -> Iterator[Row]:
    """All rows, each as soon as it is known.

    Args:
        processes: ranks of the all-reduce on this machine; None = no all-reduce.
        storage: folder whose files are read, or None.

    Raises:
        UserError: `storage` is no folder or holds no file.
    """
    files = None if storage is None else _files(storage)
    packages = [_package(name, module) for name, module in _PACKAGES.items()]
    yield from packages
    broken = {row.name for row in packages if row.state == "FAIL"}
    yield _compiler()
    yield _slurm()
    if "torch" not in broken:
        yield _gpus()
        yield _precision()
        yield _convolutions()
    if "PyAV" not in broken:
        clips = _encode_all()
        yield _pyav(clips)
        if not broken & {"DALI", "torch"}:
            yield from _dali(clips)
    if "torch" not in broken and processes is not None:
        yield _all_reduce(processes)
    if files is not None:
        yield _storage(files)


def _package(name: str, module: str) -> Row:
    try:
        # Some packages greet on stdout, which belongs to the table.
        with contextlib.redirect_stdout(io.StringIO()):
            version = str(import_module(module).__version__)
    except Exception as error:
        return Row(name=name, state="FAIL", text=f"does not import: {line_of(error)}")
    return Row(name=name, state="ok", text=version)


def _compiler() -> Row:
    if shutil.which("c++") is None:
        return Row(name="compiler", state="warn", text="no c++: model.compile=true needs one")
    return Row(name="compiler", state="ok", text="c++, for model.compile=true")


def _slurm() -> Row:
    if shutil.which("sbatch") is None:
        return Row(name="Slurm", state="ok", text="none here (submit --executor local works without)")
    run = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=20, check=False)
    if run.returncode == 0:
        return Row(name="Slurm", state="ok", text=run.stdout.strip())
    said = run.stderr.strip().splitlines() or ["no message"]
    return Row(name="Slurm", state="warn", text=f"installed, but does not answer: {said[-1]}")


def _gpus() -> Row:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not names and Path("/dev/nvidiactl").exists():
        return Row(name="GPU", state="FAIL", text="an NVIDIA driver is loaded, but torch sees no GPU")
    if not names:
        return Row(name="GPU", state="ok", text=f"none; {len(cores())} CPU cores")
    text = f"{len(names)} x {', '.join(sorted(set(names)))}; CUDA {torch.version.cuda}"
    return Row(name="GPU", state="ok", text=text)


def _precision() -> Row:
    from rev2net.distributed import computes_in_bf16, own_device

    if computes_in_bf16(own_device()):
        return Row(name="precision", state="ok", text="bf16")
    return Row(name="precision", state="ok", text="fp32; bf16 is emulated here, which can take 20 times as long")


def _convolutions() -> Row:
    import torch

    from rev2net.engine import conv3d_warning

    cudnn: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    warning = conv3d_warning(torch.__version__, cudnn)
    if warning is not None:
        return Row(name="cuDNN", state="warn", text=warning)
    return Row(name="cuDNN", state="ok", text="none (a torch without CUDA)" if cudnn is None else str(cudnn))


def _encode_all() -> dict[str, bytes]:
    clips = {}
    for codec in _ENCODERS:
        with contextlib.suppress(Exception):  # An encoder that this FFmpeg lacks is named by _pyav.
            clips[codec] = _encode(codec)
    return clips


def _encode(codec: str) -> bytes:
    import av
    import numpy as np

    encoder, container, options = _ENCODERS[codec]
    ramp = np.arange(_SIDE, dtype=np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(encoder, rate=25, options=options)
        stream.width, stream.height = _SIDE, _SIDE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for t in range(_FRAMES):
            image = np.broadcast_to(np.roll(ramp, 8 * t)[None, :, None], (_SIDE, _SIDE, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _pyav(clips: dict[str, bytes]) -> Row:
    import av

    works = []
    for codec, data in clips.items():
        with contextlib.suppress(Exception), av.open(io.BytesIO(data)) as video:
            if sum(1 for _ in video.decode(video=0)) == _FRAMES:
                works.append(codec)
    lacking = {"h264", "vp9"} - set(works)
    if lacking:
        return Row(name="PyAV codecs", state="FAIL", text=f"cannot encode and decode {', '.join(sorted(lacking))}")
    return Row(name="PyAV codecs", state="ok", text=f"encodes and decodes {', '.join(works)}")


def _dali(clips: dict[str, bytes]) -> Iterator[Row]:
    import torch

    yield _dali_row(clips, device="cpu", wanted="vp9", advice="use loader.backend=pyav on CPUs")
    if torch.cuda.is_available():
        advice = "prepare with --codec vp9 or use loader.backend=pyav"
        yield _dali_row(clips, device="mixed", wanted="h264", advice=advice)


def _dali_row(clips: dict[str, bytes], *, device: str, wanted: str, advice: str) -> Row:
    name = f"DALI codecs, {'CPU' if device == 'cpu' else 'GPU'}"
    with _quiet_stderr():
        works = [codec for codec, data in clips.items() if _dali_decodes(data, device)]
    refused = [codec for codec in clips if codec not in works]
    text = f"decodes {', '.join(works) or 'nothing'}; refuses {', '.join(refused) or 'nothing'}"
    if wanted not in works:
        return Row(name=name, state="warn", text=f"{text}: {advice}")
    return Row(name=name, state="ok", text=text)


def _dali_decodes(data: bytes, device: str) -> bool:
    import numpy as np
    from nvidia.dali import Pipeline, fn, types

    encoded = np.frombuffer(data, dtype=np.uint8)
    device_id = None if device == "cpu" else 0
    try:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
        with pipeline:
            source = fn.external_source(source=lambda: [encoded], dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.video(source, device=device))
        pipeline.build()
        (frames,) = pipeline.run()
        return bool(list(frames[0].shape()) == [_FRAMES, _SIDE, _SIDE, 3])
    except RuntimeError:
        return False


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """DALI's C++ reports each refused codec on file descriptor 2; the row says it already."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _all_reduce(processes: int) -> Row:
    import torch
    from torch.multiprocessing.spawn import spawn

    backend = "nccl" if torch.cuda.device_count() >= processes else "gloo"
    name = f"all-reduce, {processes} x {backend}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            spawn(_reduce_rank, args=(processes, backend, scratch), nprocs=processes)  # type: ignore[no-untyped-call]
        except Exception as error:
            return Row(name=name, state="FAIL", text=line_of(error))
        rates = json.loads(Path(scratch, "rates.json").read_text())
    return Row(name=name, state="ok", text=describe(rates))


def _reduce_rank(rank: int, world_size: int, backend: str, scratch: str) -> None:
    import torch
    from torch import distributed

    distributed.init_process_group(
        backend, init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size, timeout=_REDUCE_TIMEOUT
    )
    rates = bandwidths(torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu"))
    if rank == 0:
        Path(scratch, "rates.json").write_text(json.dumps(rates))
    distributed.destroy_process_group()


def bandwidths(device: Any) -> list[float]:
    """Bus bandwidth of an all-reduce of each of `_REDUCE_BYTES`, bytes per second. A collective of the default group.

    Args:
        device: this rank's torch.device.

    Raises:
        RuntimeError: a sum is wrong, or the ranks do not meet.
    """
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    rates = []
    for size in _REDUCE_BYTES:
        data = torch.full((size // 4,), float(rank + 1), device=device)
        distributed.all_reduce(data)
        if not torch.all(data == world_size * (world_size + 1) / 2):
            raise RuntimeError(f"an all-reduce of {size} bytes gave a wrong sum on rank {rank}")
        fastest = min(_timed_reduce(data) for _ in range(5))
        # Bytes that each rank must send in a ring: what nccl-tests calls bus bandwidth.
        rates.append(2 * (world_size - 1) / world_size * size / fastest)
    return rates


def describe(rates: list[float]) -> str:
    """What `bandwidths` found, in words."""
    text = ", ".join(f"{size >> 20} MiB {rate / 1e9:.2f} GB/s" for size, rate in zip(_REDUCE_BYTES, rates, strict=True))
    return f"bus bandwidth {text}"


def _timed_reduce(data: Any) -> float:
    import torch
    from torch import distributed

    data.zero_()
    distributed.barrier()
    begin = time.perf_counter()
    distributed.all_reduce(data)
    if data.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"--storage {folder} is not a folder: give the folder of a prepared data set")
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    if not files or files[0].stat().st_size == 0:
        raise UserError(f"--storage {folder} holds no bytes to read: give the folder of a prepared data set")
    return files


def _storage(files: list[Path]) -> Row:
    """Sequential reads of the largest files, one reader, until enough bytes or seconds are gone."""
    total, elapsed = 0, 0.0
    try:
        for path in files:
            if total >= _STORAGE_BYTES or elapsed >= _STORAGE_SECONDS:
                break
            size, seconds = _read(path, limit=_STORAGE_BYTES - total, seconds=_STORAGE_SECONDS - elapsed)
            total, elapsed = total + size, elapsed + seconds
    except OSError as error:
        return Row(name="storage", state="FAIL", text=line_of(error))
    rate = total / 1e6 / max(elapsed, 1e-9)
    text = f"read {total / 1e6:.0f} MB at {rate:.0f} MB/s, one reader, cache dropped where allowed"
    return Row(name="storage", state="ok", text=text)


def _read(path: Path, *, limit: int, seconds: float) -> tuple[int, float]:
    total = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        while total < limit and time.perf_counter() - begin < seconds and (data := os.read(descriptor, _READ_BYTES)):
            total += len(data)
        return total, time.perf_counter() - begin
    finally:
        os.close(descriptor)


def line_of(error: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
