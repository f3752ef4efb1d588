"""What goes into a backend, what comes out, and the batch that the network gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from dataloaders.flow.codes import BOUND, LEVELS, ZERO_CODE
from dataloaders.plan import IDENTITY_COLOUR, ClipPlan, ClipShape
from dataloaders.shards import SampleInfo

Stream = Literal["rgb", "flow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRequest:
    """One clip to decode.

    Attributes:
        rgb, flow: the encoded videos; None where it is not wanted. One is.
        sample: index in the unshuffled data set.
        view: which of the video's test views this is; 0 in training.
    """

    key: str
    rgb: bytes | None
    flow: bytes | None
    info: SampleInfo
    plan: ClipPlan
    shape: ClipShape
    sample: int = 0
    view: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RawClips:
    """A backend's output, on the device it works on.

    Attributes:
        frames: uint8 [N, T, H, W, 3], RGB, full range; or None.
        flow: uint8 [N, T, H, W, 2], codes of u and v (see dataloaders.flow.codes), still in the units of the stored
            video and of the unflipped picture; or None.
    """

    frames: torch.Tensor | None
    flow: torch.Tensor | None


class Backend(Protocol):
    """A way of executing clip plans."""

    def decode(self, requests: Sequence[ClipRequest]) -> RawClips:
        """Decode clips of one shape, all of the same streams; DecodeError names the first that cannot be."""

    def close(self) -> None:
        """Stop the backend's threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBatch:
    """Clips as the network gets them, the same from every backend.

    Attributes:
        video: float32 [N, 3, T, H, W] in [-1, 1]; or None.
        flow: float32 [N, 2, T, H, W], u and v in units of 20 pixels of the resized clip, clipped to [-1, 1]; or None.
        label: int64 [N].
        sample: int64 [N], index in the unshuffled data set.
        view: int64 [N], the test view, 0 in training.
        keys: the samples' keys.
        sources: the source files' paths, relative to the root that they were prepared from.
    """

    video: torch.Tensor | None
    flow: torch.Tensor | None
    label: torch.Tensor
    sample: torch.Tensor
    view: torch.Tensor
    keys: tuple[str, ...]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def stream(self, name: Stream) -> torch.Tensor:
        """`video` or `flow`, which the loader was told to decode."""
        clips = self.video if name == "rgb" else self.flow
        assert clips is not None, f"the loader does not decode {name}"
        return clips

    def to(self, device: torch.device | str, channels_last: bool) -> ClipBatch:
        """The batch on `device`, the clips in channels_last_3d or in contiguous memory format."""
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True).contiguous(memory_format=layout)

        return replace(
            self,
            video=move(self.video),
            flow=move(self.flow),
            label=self.label.to(device, non_blocking=True),
            sample=self.sample.to(device, non_blocking=True),
            view=self.view.to(device, non_blocking=True),
        )


def to_batch(raw: RawClips, requests: Sequence[ClipRequest], device: torch.device | str) -> ClipBatch:
    """Apply colour jitter, normalise, and scale the flow, on `device`.

    The clips are channels_last_3d in memory, which is how they were decoded; `ClipBatch.to` changes that.
    """

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    return ClipBatch(
        video=None if raw.frames is None else _video(raw.frames.to(device, non_blocking=True), requests),
        flow=None if raw.flow is None else _flow(raw.flow.to(device, non_blocking=True), requests),
        label=integers([request.info.label for request in requests]),
        sample=integers([request.sample for request in requests]),
        view=integers([request.view for request in requests]),
        keys=tuple(request.key for request in requests),
        sources=tuple(request.info.source for request in requests),
    )


def _video(frames: torch.Tensor, requests: Sequence[ClipRequest]) -> torch.Tensor:
    """[0, 255] to [-1, 1], through each clip's colour matrix."""
    if all(request.plan.colour == IDENTITY_COLOUR for request in requests):
        return frames.mul(2 / 255).sub_(1).permute(0, 4, 1, 2, 3)
    colour = torch.tensor([request.plan.colour for request in requests], dtype=torch.float32)
    colour = colour.reshape(-1, 3, 4).mul_(2 / 255)
    colour[:, :, 3] -= 1
    colour = colour.to(frames.device, non_blocking=True)
    mixed = torch.baddbmm(colour[:, None, :, 3], frames.flatten(1, 3).float(), colour[:, :, :3].transpose(1, 2))
    return mixed.clamp_(-1, 1).view(frames.shape).permute(0, 4, 1, 2, 3)


def _flow(codes: torch.Tensor, requests: Sequence[ClipRequest]) -> torch.Tensor:
    """Codes to units of 20 pixels of the clip: scaled with the resize, u negated by the flip, both by the reversal."""
    scales = []
    for request in requests:
        plan, shape = request.plan, request.shape
        sign = -1.0 if plan.backwards else 1.0
        u = sign * (-1.0 if plan.flip else 1.0) * shape.width / plan.crop[3]
        v = sign * shape.height / plan.crop[2]
        scales.append([u, v])
    scale = torch.tensor(scales, dtype=torch.float32).mul_(1 / LEVELS)[:, None, None, None, :]
    flow = codes.float().sub_(ZERO_CODE).mul_(scale.to(codes.device, non_blocking=True))
    return flow.clamp_(-1, 1).permute(0, 4, 1, 2, 3)


assert BOUND == 20.0, "the docstrings say units of 20 pixels"
