"""A data set as one HTML page: a searchable contact sheet. The command `rev2net browse`."""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dataloaders.errors import DecodeError, UserError
from dataloaders.flow import decode_flow
from dataloaders.flow.colours import flow_colours
from dataloaders.progress import Progress
from dataloaders.pyav_backend import decode_pictures, to_luma, to_rgb
from dataloaders.shards import (
    FLOW_EXTENSION,
    INFO_EXTENSION,
    RGB_EXTENSION,
    DataSet,
    SampleInfo,
    ShardReader,
    check_output,
    written_aside,
)
from dataloaders.workers import cores

TEMPLATE = Path(__file__).with_suffix(".html")
_ROW = 72
"""Height of a thumbnail in pixels."""
_QUALITY = 55
_FASTEST = 8.0
"""Pixels per frame that have the full colour: one scale for all clips, so that pages can be compared by eye."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrowseReport:
    """What a page shows: samples in all, and those of them that could not be decoded."""

    samples: int
    failed: int


def browse(
    location: str | Path,
    out: Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    frames: int = 4,
    workers: int = 1,
) -> BrowseReport:
    """Write the page, whole or not at all.

    For every sample evenly spaced frames, the flow that starts at each of them (hue is direction, saturation speed, 8
    pixels per frame or more are full), label, source, length. The page holds its pictures and needs no network.

    Args:
        location: folder or URL of a prepared data set.
        out: the HTML file.
        split: only this one.
        limit: the first so many samples of every split, in the order of the shards, which is random.
        frames: thumbnails of a sample.
        workers: threads that decode.

    Raises:
        UserError: no data set, no such split, or a number out of range.
    """
    for name, value in (("--frames", frames), ("--workers", workers), ("--limit", 1 if limit is None else limit)):
        if value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
    check_output(out, (".html", ".htm"))
    data = DataSet.open(location)
    splits = data.splits if split is None else (split,)
    total = sum(min(data.num_samples(s), limit or data.num_samples(s)) for s in splits)
    failed = 0

    def told() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for card in _cards(data, splits, limit, frames, workers):
            failed += "error" in card
            progress.step()
            yield card

    with Progress(total, "clip") as progress:
        write_page(out, Path(location).resolve().name, told())
    return BrowseReport(samples=total, failed=failed)


def write_page(out: Path, title: str, cards: Iterable[dict[str, Any]]) -> None:
    """Put cards into the page's template: `key`, `split`, `label`, `shard`, and `source`, `frames`, `seconds`, `size`,
    `picture` (a data URL) or `error`, as they are known. Cards are written as they come and never held together.
    """
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("/*SAMPLES*/")
    with written_aside(out) as aside, aside.open("w", encoding="utf-8") as page:
        page.write(head.replace("/*TITLE*/", _inside_script(title)))
        for number, card in enumerate(cards):
            page.write((",\n" if number else "") + _inside_script(card))
        page.write(tail)


def _inside_script(value: Any) -> str:
    # A source may be called anything: "</script>" must not end the script that holds it.
    return json.dumps(value).replace("<", "\\u003c")


def _cards(
    data: DataSet, splits: tuple[str, ...], limit: int | None, frames: int, workers: int
) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(workers) as pool:
        for split in splits:
            left = limit or data.num_samples(split)
            for shard in data.shards(split):
                if left == 0:
                    break  # a remote shard is fetched whole
                with shard.open() as reader:
                    count = min(left, len(reader))
                    left -= count
                    # A few at a time: what is decoded waits in memory until it is written.
                    for start in range(0, count, 4 * workers):
                        indices = range(start, min(count, start + 4 * workers))
                        yield from pool.map(partial(_card, reader, split, frames), indices)


def _card(reader: ShardReader, split: str, frames: int, index: int) -> dict[str, Any]:
    card: dict[str, Any] = {"key": reader.key(index), "split": split, "label": "?", "shard": reader.path.name}
    try:
        parts = reader.read(index)
        info = SampleInfo.from_json(card["key"], parts.get(INFO_EXTENSION, b""))
        card |= {
            "label": info.class_name,
            "source": info.source,
            "frames": info.num_frames,
            "seconds": round(info.num_frames / info.fps, 2),
            "size": f"{info.width}x{info.height}",
        }
        card["picture"] = _strip(parts, info, frames)
    except DecodeError as error:
        card["error"] = error.reason
    return card


def _strip(parts: dict[str, bytes], info: SampleInfo, count: int) -> str:
    """A row of frames, and under it a row of flow if there is any, as a data URL."""
    picked = np.linspace(0, info.num_frames - 1, min(count, info.num_frames)).round().astype(int).tolist()
    width = max(1, round(_ROW * info.width / info.height))
    pictures = decode_pictures(
        parts.get(RGB_EXTENSION, b""), set(picked), info.fps, info.key, to_rgb, (info.height, info.width)
    )
    rows = [[pictures[i] for i in picked]]
    if FLOW_EXTENSION in parts and info.flow_height is not None and info.flow_width is not None:
        size = (2 * info.flow_height, info.flow_width)
        planes = decode_pictures(parts[FLOW_EXTENSION], set(picked), info.fps, info.key, to_luma, size)
        rows.append([_colours(planes[i]) for i in picked])
    strip = Image.new("RGB", (width * len(picked), _ROW * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            strip.paste(Image.fromarray(picture).resize((width, _ROW)), (x * width, y * _ROW))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colours(plane: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    picture = flow_colours(torch.from_numpy(decode_flow(plane[None])[0]), _FASTEST)
    colours: npt.NDArray[np.uint8] = picture.permute(1, 2, 0).contiguous().numpy()
    return colours


def add_browse_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rev2net browse` to a parser."""
    parser.description = "Write one HTML page with frames, flow, label and source of every sample; needs no network."
    parser.epilog = "example: rev2net browse data sheet.html --split val"
    parser.add_argument("data", metavar="DATA", help="folder that `rev2net prepare` made, or its URL")
    parser.add_argument("out", type=Path, metavar="OUT.html", help="page to write")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--limit", type=int, help="the first so many samples of every split")
    parser.add_argument("--frames", type=int, default=4, help="thumbnails of a sample (%(default)s)")
    parser.add_argument("--workers", type=int, default=len(cores()), help="threads (the number of cores)")


def run_browse(args: argparse.Namespace) -> int:
    """Run `rev2net browse`; returns the exit status, raises UserError for a user's mistake."""
    report = browse(args.data, args.out, split=args.split, limit=args.limit, frames=args.frames, workers=args.workers)
    print(f"{args.out}: {report.samples} samples, {args.out.stat().st_size / 2**20:.1f} MB; open it in a browser")
    if report.failed:
        print(f"{report.failed} samples could not be decoded: search the page for `error`", file=sys.stderr)
    return 0
