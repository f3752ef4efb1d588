"""`rev2net export`: the test-time network as a file that other programs run, torch.export's `.pt2` or ONNX.

The network takes clips as `dataloaders.batch.ClipBatch` has them, N C T H W with any N, and gives logits, N x classes.
What else a program has to know stands in the file itself, as JSON called `rev2net.json`: see `Description`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from dataloaders.batch import Stream
from dataloaders.errors import UserError, first_line
from dataloaders.plan import ClipShape, Views
from dataloaders.shards import check_output, written_aside
from dataloaders.transcode import PrepareSettings

if TYPE_CHECKING:  # rev2net.config brings torchvision, which takes seconds that a mistyped command should not
    from rev2net.checkpoint import RunState
    from rev2net.config import Config

_HELP = """Write the test-time network, without decoders, as a file that runs without this package: .pt2 for PyTorch
(torch.export.load), .onnx for onnxruntime and others. Classes and preprocessing stand in it. It is run once, and its
outputs compared with the checkpoint's, before it gets its name.

examples:
  rev2net export runs/demo demo.pt2
  rev2net export runs/demo/checkpoints/best demo.onnx
  rev2net predict demo.onnx video.mp4
"""

DESCRIPTION = "rev2net.json"
"""Name of the description in the file: of an extra file of .pt2, of an entry of ONNX's metadata_props."""

TOLERANCE = 1e-4
"""Of the logits of the file and of the checkpoint, absolute and relative."""

_CHANNELS: dict[Stream, str] = {
    "rgb": "red, green, blue, from 0 to 255 divided by 127.5, less 1",
    "flow": "u (to the right) and v (down), TV-L1 flow to the next frame in pixels of the clip, divided by 20, within "
    "-1 and 1",
}
_PREPROCESSING = (
    "float32, clips x channels x frames x rows x columns; channels {channels}; of each frame the largest square, in "
    "the middle or (3 crops) also at both ends of the longer side, resized to `size` bilinearly with antialiasing (a "
    "triangle as wide as the reduction; without it accuracy suffers) and rounded to whole numbers from 0 to 255 before "
    "all else, codes of flow too; softmax of the logits, averaged over the clips of a video"
)
"""What stands in an exported file for who feeds it without this package."""

Scorer = Callable[[torch.Tensor], torch.Tensor]
"""From clips N C T H W to logits N x classes."""


class Description(BaseModel):
    """What a program has to know to feed a network and to read its output.

    A video is brought to the size and frame rate of `preparation`; a clip is `frames` of its frames, `stride` apart (or
    in equal runs from `segments` parts of it), of which the largest square is cut and resized, antialiased, to
    `size` pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: str
    classes: tuple[str, ...] = Field(min_length=1, description="in order of the logits")
    input: Stream = Field(description="rgb: 3 channels in [-1, 1]; flow: u, v in units of 20 pixels, within [-1, 1]")
    frames: int = Field(gt=0, le=10_000)
    size: int = Field(gt=0, le=10_000)
    stride: int = Field(gt=0, le=10_000)
    segments: int = Field(ge=0, le=10_000)
    views: str = Field(description="clips of a video whose scores are averaged when it is tested")
    preparation: dict[str, Any] = Field(description="size and rate of the videos it learned from")
    preprocessing: str = Field("", description="the same and the rest in words, for a program without this package")
    checkpoint: str = Field(description="run and step that it is of")

    @classmethod
    def of(cls, config: Config, state: RunState) -> Description:
        """Of a checkpoint's network."""
        data, model = config.data, config.model
        return cls(
            network=model.name,
            classes=state.classes,
            input=model.input,
            frames=data.frames,
            size=data.size,
            stride=data.stride,
            segments=data.segments,
            views=config.eval.views,
            preparation=state.preparation,
            preprocessing=_PREPROCESSING.format(channels=_CHANNELS[model.input]),
            checkpoint=f"{Path(config.output).name}, step {state.step}",
        )

    @classmethod
    def read(cls, text: str, source: str, clip: Sequence[object], logits: Sequence[object]) -> Description:
        """From a file's metadata.

        Args:
            clip, logits: shapes of what the network in the file takes and gives; of any first dimension.

        Raises:
            UserError: it is not one of ours, or of another network.
        """
        try:
            description = cls.model_validate_json(text)
            Views.parse(description.views)
            PrepareSettings.from_json(description.preparation)
            shape = description.shape
            if shape.segments and shape.frames % shape.segments:
                raise UserError(f"{shape.frames} frames cannot be shared out to {shape.segments} segments")
            told = [description.channels, shape.frames, shape.height, shape.width], [len(description.classes)]
            if (list(clip[1:]), list(logits[1:])) != told:
                raise UserError(f"the network takes {list(clip)} and gives {list(logits)}")
        except (ValidationError, UserError) as error:
            reason = first_line(error)
            raise UserError(f"the {DESCRIPTION} in {source} is damaged ({reason}): export it again") from None
        return description

    @property
    def shape(self) -> ClipShape:
        """Of a clip."""
        return ClipShape(
            frames=self.frames, height=self.size, width=self.size, stride=self.stride, segments=self.segments
        )

    @property
    def channels(self) -> int:
        """Of a clip."""
        return {"rgb": 3, "flow": 2}[self.input]


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net export`."""
    parser.description = _HELP
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, .pt2 or .onnx")


def run_export(args: argparse.Namespace) -> int:
    """`rev2net export`."""
    out: Path = args.out
    check_output(out, tuple(_FORMATS))
    from rev2net import checkpoint

    found = checkpoint.find(args.checkpoint)
    network, config, state = checkpoint.load_encoder(found)
    description = Description.of(config, state)
    write, read = _FORMATS[out.suffix]
    with written_aside(out) as aside:
        write(network, description, aside)
        difference = _check(network, *read(aside))
    shape = f"N x {description.channels} x {description.frames} x {description.size} x {description.size}"
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {description.network} of {description.checkpoint}\n"
        f"takes {shape}, gives N x {len(description.classes)} logits, equal to the checkpoint's to {difference:.0e}"
    )
    return 0


def _check(network: nn.Module, scorer: Scorer, description: Description) -> float:
    """The largest difference of the file's logits; RuntimeError beyond `TOLERANCE`."""
    largest = 0.0
    for clips in (1, 3):
        clip = example(description, clips)
        with torch.no_grad():
            expected, given = network(clip), scorer(clip)
        difference = float((given - expected).abs().max())
        if not torch.allclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise RuntimeError(
                f"the exported network gives other logits, by {difference:.1e} for {clips} clips: nothing is written"
            )
        largest = max(largest, difference)
    return largest


def example(description: Description, clips: int) -> torch.Tensor:
    """Random clips of the right shape, the same each time."""
    size = description.size
    shape = (clips, description.channels, description.frames, size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(clips)).mul_(2).sub_(1)


def _write_pt2(network: nn.Module, description: Description, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (example(description, 2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={DESCRIPTION: description.model_dump_json()})


def _write_onnx(network: nn.Module, description: Description, path: Path) -> None:
    program = torch.onnx.export(
        network,
        (example(description, 2),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["clip"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[DESCRIPTION] = description.model_dump_json()
    program.save(path, external_data=False)


def read_exported(path: Path) -> tuple[Scorer, Description]:
    """A file that `rev2net export` wrote, ready to be run.

    Raises:
        UserError: no such file, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}: make it with `rev2net export`")
    return _FORMATS[path.suffix][1](path)


def is_exported(path: str | Path) -> bool:
    """Whether a path is that of an exported file, by its ending."""
    return Path(path).suffix in _FORMATS


def _read_pt2(path: Path) -> tuple[Scorer, Description]:
    _refuse_pickles(path)
    extra: dict[str, str] = {DESCRIPTION: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        nodes = {node.name: node for node in program.graph.nodes}
        (given,), (made,) = program.graph_signature.user_inputs, program.graph_signature.user_outputs
        clip, logits = (list(nodes[str(name)].meta["val"].shape) for name in (given, made))
        network = program.module()
    except Exception as error:  # of whatever does not fit this version of PyTorch
        raise UserError(
            f"{path} cannot be loaded by torch {torch.__version__} ({first_line(error)}): export it again with this one"
        ) from None
    return network, Description.read(extra[DESCRIPTION], str(path), clip, logits)


def _refuse_pickles(path: Path) -> None:
    """UserError for an archive that `torch.export.load` would not read as tensors and a program's text.

    It unpickles what an archive says is pickled, and loads compiled code; our own files hold neither. The text itself
    can do what any program can.
    """
    import io

    from torch.export.pt2_archive._package import PT2ArchiveReader

    allowed = ("archive_format", "archive_version", "byteorder", ".data/", "version", "models/model.json", "extra/",
               "data/weights/", "data/constants/", "data/sample_inputs/model.pt")  # fmt: skip
    try:
        with PT2ArchiveReader(str(path)) as archive:
            names = archive.get_file_names()
            odd = [name for name in names if not name.startswith(allowed)]
            odd += [name for name in names if name.endswith(".pt") and name != "data/sample_inputs/model.pt"]
            for name in names:
                if name.endswith("_config.json"):
                    entries: Mapping[str, Any] = json.loads(archive.read_string(name))["config"]
                    tensors = ("weight_", "tensor_")
                    odd += [
                        f"{name} ({key})"
                        for key, entry in entries.items()
                        if entry["use_pickle"] or not entry["path_name"].startswith(tensors)
                    ]
            torch.load(io.BytesIO(archive.read_bytes("data/sample_inputs/model.pt")), weights_only=True)
            described = f"extra/{DESCRIPTION}" in names
    except Exception as error:  # the reader's own errors have no common type
        raise UserError(f"{path} is no .pt2 file of `rev2net export` ({first_line(error)}): export it again") from None
    if odd or not described:
        what = f"holds {odd[0]}" if odd else f"has no {DESCRIPTION}"
        raise UserError(f"{path} {what}, unlike the files of `rev2net export`: export it again")


def _read_onnx(path: Path) -> tuple[Scorer, Description]:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime's errors have no common type
        raise UserError(f"{path} is no ONNX file that can be run ({first_line(error)}): export it again") from None
    described = session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
    if described is None:
        raise UserError(f"{path} has no {DESCRIPTION}, unlike the files of `rev2net export`: export it again")

    def scorer(clip: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"clip": clip.contiguous().cpu().numpy()})
        return torch.from_numpy(logits)

    shapes = [node.shape for nodes in (session.get_inputs(), session.get_outputs()) for node in nodes]
    if [node.name for node in (*session.get_inputs(), *session.get_outputs())] != ["clip", "logits"]:
        raise UserError(f"{path} takes and gives other things than files of `rev2net export`: export it again")
    return scorer, Description.read(described, str(path), *shapes)


_FORMATS = {".pt2": (_write_pt2, _read_pt2), ".onnx": (_write_onnx, _read_onnx)}
