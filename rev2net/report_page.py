"""The report as text, Markdown and one HTML page: the same sections, and pictures on the page."""

from __future__ import annotations

import base64
import io
import json
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rev2net.report import Cell, Report, Result, whole
from rev2net.store import Run, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")

CURVES = {
    "loss/ce": "cross-entropy, training",
    "train/top1": "top-1, training",
    "val/top1": "top-1, validation",
    "target/top1": "top-1, other domain",
    "val/flow_epe": "flow error, pixels",
    "val/frame_rmse": "frame error, rms",
}
"""Metrics whose histories are drawn, and what is written over them."""

INTRODUCTION = (
    "Top-1 accuracy in percent, the paper's and ours. Ours is the mean over seeds of the means over the official "
    "splits. ± is the standard deviation (n - 1) over the seeds, or over the splits where that is said.",
    "A number comes from a training that came to its end, by its test after the last step, or from a test that "
    "rev2net eval --log or rev2net splits --log kept. Of several for one seed and split those with the "
    "configuration's views come first, then a test of its own before the training's last one, then the newest; of two "
    "trainings of one seed and split the newer one stands for both. Runs that failed, were stopped or still run enter "
    "nothing. Seeds that have fewer splits than others do not enter the mean.",
    "A number with a star has runs that deviate from the cell's configuration: what deviates stands beside them below.",
)


class Linked(str):
    """A word that leads to another section on the page."""

    anchor: str

    def __new__(cls, text: str, anchor: str) -> Linked:
        """The text, with the anchor of the section."""
        made = super().__new__(cls, text)
        made.anchor = anchor
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of words."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        long: on the page it is folded.
    """

    title: str
    anchor: str
    lines: Sequence[str] = ()
    grids: Sequence[Grid] = ()
    notes: Sequence[str] = ()
    long: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a section, as a data URL, or why there is none."""

    title: str
    url: str = ""


def sections(report: Report) -> list[Section]:
    """All of the report but its pictures."""
    made = [_introduction(report)]
    made += [_table(name, table, report) for name, table in report.tables.items()]
    made += [_details(cell) for cell in report.cells.values() if cell.results]
    empty = [_title(cell) for cell in report.cells.values() if not cell.results]
    if empty:
        made.append(Section(title="Cells without a run", anchor="empty", lines=["; ".join(empty) + "."]))
    return made


def _introduction(report: Report) -> Section:
    results = [result for cell in report.cells.values() for result in cell.results]
    rows = [row for table in report.tables.values() for row in table["rows"]]
    shown = [report.cells[tuple(entry["runs"])] for row in rows for entry in row["cells"]]
    until = f", the newest of {_day(max(r.run.started for r in results))}" if results else ""
    counts = (
        f"{sum(cell.value is not None for cell in shown)} of {len(shown)} cells have a number of ours. "
        f"Runs of cells: {len(results)}{until}. Runs of other kinds, left out: {report.left_out}."
    )
    if report.orphans:
        counts += f" {report.orphans} of them test a training of a cell beside one that is not in the store."
    return Section(title="The paper's tables, and ours", anchor="top", lines=[*INTRODUCTION, counts])


def _table(name: str, table: Mapping[str, Any], report: Report) -> Section:
    header = ["Model", "Input"]
    for column in table["columns"]:
        header += [f"{column}: paper", "ours", "ours - paper"]
    rows = []
    for row in table["rows"]:
        words = [row["model"], row["input"]]
        for entry in row["cells"]:
            cell = report.cells[tuple(entry["runs"])]
            words += ["-" if entry["paper"] is None else f"{entry['paper']:.1f}", _ours(cell)]
            known = entry["paper"] is not None and cell.value is not None
            # Plus zero: what rounds to -0.0 is 0.0.
            words.append(f"{round(100 * (cell.value or 0) - entry['paper'], 1) + 0:+.1f}" if known else "-")
        rows.append(words)
    grids = [Grid(header=header, rows=rows), *_data(table, report)]
    return Section(title=table["title"], anchor=name, grids=grids, notes=[table["note"]] if "note" in table else [])


def _ours(cell: Cell) -> str:
    if not cell.results:
        return "no run"
    anchor = _anchor(cell)
    if cell.value is None:
        return Linked("no run that counts", anchor)
    words = [f"{cell.seeds} seed{'s' if cell.seeds > 1 else ''}"]
    if cell.splits < len(cell.wanted.splits):
        words.append(f"{cell.splits} of {len(cell.wanted.splits)} splits")
    spread = ""
    if cell.spread is not None:
        spread = f" ± {100 * cell.spread[0]:.1f}" + (" over splits" if cell.spread[1] == "splits" else "")
    return Linked(f"{100 * cell.value:.1f}{spread} ({', '.join(words)}){' *' if cell.deviates else ''}", anchor)


def _data(table: Mapping[str, Any], report: Report) -> list[Grid]:
    """What the runs behind a table were trained and tested on: videos of each column, split and part."""
    seen: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in table["rows"]:
        for column, entry in zip(table["columns"], row["cells"], strict=True):
            cell = report.cells[tuple(entry["runs"])]
            for result in cell.counted:
                for training in result.trainings:
                    for part, key in _parts(training, cell):
                        words = (column, str(result.split), part, *_counts(training.params, key))
                        seen[words].add(training.id)
    header = ("data of", "split", "part", "videos used", "missing", "quarantined", "share of the lists", "trainings")
    rows = [(*words, str(len(ids))) for words, ids in sorted(seen.items())]
    return [Grid(title="Data of the trainings behind these numbers", header=header, rows=rows)] if rows else []


def _parts(training: Run, cell: Cell) -> list[tuple[str, str]]:
    """What a training saw, in words and as the beginning of its parameters."""
    parts = [("training", "data.train")]
    unlabelled = any(training.params.get(f"target.{use}") == "True" for use in ("adapt", "decode"))
    if cell.wanted.tested_on == "target" and unlabelled:
        parts.append(("training, without labels", "target.train"))
    return [*parts, ("test", f"{cell.wanted.tested_on}.val")]


def _counts(params: Mapping[str, str], key: str) -> tuple[str, str, str, str]:
    """Used, missing, quarantined, and the share used of all."""
    found = [whole(params.get(f"{key}.{name}")) for name in ("videos", "missing", "quarantined")]
    used, missing, quarantined = ("unknown" if number is None else str(number) for number in found)
    known = [number for number in found if number is not None]
    share = f"{100 * known[0] / max(1, sum(known)):.2f} %" if len(known) == len(found) else "unknown"
    return used, missing, quarantined, share


def _details(cell: Cell) -> Section:
    about = ("run", "name", "what", "counts", "seed", "split", "top-1")
    made = ("views", "precision", "started", "commit", "deviations")
    states = Counter(result.run.status for result in cell.results if result.run.status != "FINISHED")
    line = f"{_ours(cell)}; {len(cell.counted)} of {len(cell.results)} runs count."
    if states:
        line += " Not finished: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())) + "."
    grid = Grid(header=(*about, *made), rows=[_row(result) for result in cell.results])
    return Section(title=_title(cell), anchor=_anchor(cell), lines=[line], grids=[grid], long=True)


def _row(result: Result) -> tuple[str, ...]:
    run = result.run
    tested = " and ".join(training.id[:8] for training in result.trainings)
    return (
        run.id,
        run.name,
        f"test of {tested}" if result.is_test else f"training, {result.steps} steps",
        "yes" if result.why_not is None else f"no: {result.why_not}",
        result.seed,
        str(result.split) if result.split else "?",
        "-" if result.top1 is None else f"{100 * result.top1:.2f}",
        result.views,
        result.precision,
        _day(run.started),
        run.tags.get("mlflow.source.git.commit", "unknown")[:12],
        "; ".join(result.deviations) or "none",
    )


def _title(cell: Cell) -> str:
    return " + ".join(cell.configs)


def _anchor(cell: Cell) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _title(cell).lower())


def _day(milliseconds: int) -> str:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):  # whoever wrote the run may have written anything
        return "unknown"


def as_text(made: Sequence[Section]) -> str:
    """For a terminal: columns padded with blanks."""
    blocks = []
    for section in made:
        blocks.append(f"{section.title}\n{'=' * len(section.title)}")
        blocks += map(_wrapped, section.lines)
        for grid in section.grids:
            blocks.append("\n".join([*([grid.title] if grid.title else []), *_columns(grid)]))
        blocks += map(_wrapped, section.notes)
    return "\n\n".join(_printable(block) for block in blocks) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _columns(grid: Grid) -> list[str]:
    rows = [[_printable(word.replace("\n", " ")) for word in row] for row in (grid.header, *grid.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(text: str) -> str:
    """Without what would steer a terminal: a run may be called anything."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def as_markdown(made: Sequence[Section]) -> str:
    """With tables as GitHub understands them."""
    blocks = []
    for number, section in enumerate(made):
        blocks.append(f"{'##' if number else '#'} {_escaped(section.title)}")
        blocks += map(_escaped, section.lines)
        for grid in section.grids:
            blocks += [f"**{_escaped(grid.title)}**"] if grid.title else []
            rows = [grid.header, ["---"] * len(grid.header), *grid.rows]
            blocks.append("\n".join("| " + " | ".join(_escaped(w) for w in row) + " |" for row in rows))
        blocks += map(_escaped, section.notes)
    return "\n\n".join(blocks) + "\n"


def _escaped(text: str) -> str:
    if re.fullmatch("-+", text):
        return text
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(_printable(text).split()))


def as_html(made: Sequence[Section], pictures: Mapping[str, Sequence[Picture]]) -> str:
    """One page that needs nothing else.

    Args:
        pictures: of the sections, by their anchors.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(sections=made, pictures=pictures)


def draw(store: Store, report: Report) -> dict[str, list[Picture]]:
    """Learning curves of every single stream, confusion matrix of every cell, by the anchors of their sections."""
    pictures = {}
    for cell in report.cells.values():
        if cell.counted:
            curves = [_curves(store, cell)] if len(cell.configs) == 1 else []
            pictures[_anchor(cell)] = [*curves, _confusion(store, cell)]
    return pictures


def _curves(store: Store, cell: Cell) -> Picture:
    from rev2net import pictures

    panels = {}
    for metric, title in CURVES.items():
        lines = {(r.seed, r.split): store.history(r.trainings[0], metric) for r in cell.counted}
        lines = {which: line for which, line in lines.items() if line}
        if lines:
            panels[title] = lines
    if not panels:
        return Picture("No learning curves: the trainings logged none.")
    return Picture("Learning curves", _as_url(pictures.learning_curves(panels)))


def _confusion(store: Store, cell: Cell) -> Picture:
    """Summed over the runs that count."""
    import numpy as np

    from rev2net import pictures

    name = "confusion_val.json" if cell.wanted.tested_on == "data" else "confusion_target.json"
    found = [_matrix(store.artifact(r.run, "confusion.json" if r.is_test else name)) for r in cell.counted]
    known = [matrix for matrix in found if matrix is not None]
    if not known:
        return Picture("No confusion matrix: the runs' artifacts are not there; copy mlartifacts beside the store.")
    if len({classes for classes, _ in known}) > 1:
        return Picture("No confusion matrix: the runs have different classes.")
    counts = np.sum([counts for _, counts in known], axis=0)
    title = f"Confusion matrix, sum of {len(known)} of {len(found)} runs, {counts.sum()} videos"
    return Picture(title, _as_url(pictures.confusion_matrix(counts, known[0][0], "")))


def _matrix(data: bytes | None) -> tuple[tuple[str, ...], Any] | None:
    """Classes and counts of a confusion matrix; None where the artifact is absent or none."""
    import numpy as np

    try:
        tree = json.loads(data or b"")
        classes, counts = tuple(map(str, tree["classes"])), np.array(tree["confusion"], dtype=np.int64)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return (classes, counts) if counts.shape == (len(classes), len(classes)) and (counts >= 0).all() else None


def _as_url(figure: Figure) -> str:
    """SVG whose words stay words, the same bytes every time."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rev2net"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
