"""`rev2net report`: the paper's tables from MLflow runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from dataloaders.errors import UserError

_REPORT = """Tables 1 to 5 of the paper, our numbers beside its own, from the runs of an MLflow store alone.

They are printed; with --out they are also written as FOLDER/report.md and FOLDER/report.html, which has learning curves
and confusion matrices.

A training is of a cell where its configuration says so (tracking.cell, as those below configs/ do). Two streams are
fused by `rev2net eval --fuse --log` or `rev2net splits --fuse --log`. Nothing in the store is changed.

examples:
  rev2net report
  rev2net report --out report
  rev2net report --store sqlite:///copied/mlflow.db --out report      from another machine; mlartifacts beside it
  rev2net report --store http://127.0.0.1:5000 --experiment rev2net
"""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rev2net report`."""
    parser.description = _REPORT
    parser.add_argument(
        "--store",
        metavar="URI",
        help="MLflow's store: sqlite:///FILE or http://... (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)",
    )
    parser.add_argument("--experiment", metavar="NAME", nargs="+", default=[], help="only these (default: all)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write report.md and report.html there")


def run_report(args: argparse.Namespace) -> int:
    """`rev2net report`."""
    from rev2net.store import database, default_store, reading

    store_uri = args.store or default_store()
    database(store_uri)
    out: Path | None = args.out
    if out is not None and (file := next((p for p in (out, *out.parents) if p.exists() and not p.is_dir()), None)):
        raise UserError(f"--out {out} cannot be a folder, since {file} is a file: give one, which is made if need be")
    from dataloaders.shards import write_atomically
    from rev2net import report_page
    from rev2net.report import read_report

    with reading(store_uri) as store:
        report = read_report(store, args.experiment)
        sections = report_page.sections(report)
        print(report_page.as_text(sections), end="", flush=True)
        pictures = {} if out is None else report_page.draw(store, report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "report.md", report_page.as_markdown(sections).encode())
        write_atomically(out / "report.html", report_page.as_html(sections, pictures).encode())
        print(f"\n{out / 'report.md'}, {out / 'report.html'}")
    return 0
