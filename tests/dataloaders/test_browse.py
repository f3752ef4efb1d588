"""The contact sheet: what it says, and that a real browser shows, filters and pages it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import moving, write_video
from PIL import Image

from dataloaders.browse import browse, write_page
from dataloaders.prepare import prepare
from dataloaders.shards import DataSet, ShardReader
from dataloaders.sources import read_folder
from dataloaders.transcode import PrepareSettings
from rev2net.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

NASTY = "</script><img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of two clips; everything moves to the right."""
    root = tmp_path_factory.mktemp("browse")
    for name in ("jump", "run"):
        for i in range(2):
            write_video(root / "in" / name / f"{name} {i}.mp4", moving(10, 64, 96, step=4, seed=i))
    prepare(read_folder(root / "in", val_fraction=0.5), root / "data", PrepareSettings(short_side=64))
    return root / "data"


def cards_of(page: Path) -> list[dict[str, Any]]:
    found = re.search(r"const SAMPLES = (\[.*?\]);\nconst PAGE", page.read_text(), re.DOTALL)
    assert found is not None
    cards: list[dict[str, Any]] = json.loads(found[1])
    return cards


def shown(page: Path, search: str = "") -> str:
    """The page's elements after its script has run, in a browser without network."""
    assert CHROMIUM is not None
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * 0.0.0.0",
    )
    url = f"{page.as_uri()}#{search}"
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    body = done.stdout.partition("<body>")[2]
    assert body, done.stderr[-2000:]
    return re.sub(r"<script>.*?</script>", "", body, flags=re.DOTALL)


def test_every_sample_is_on_the_page_with_its_frames_and_its_flow(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    report = browse(data, page, workers=2)
    cards = cards_of(page)
    assert report.samples == len(cards) == 4 and report.failed == 0
    assert sorted(card["source"] for card in cards) == [
        "jump/jump 0.mp4",
        "jump/jump 1.mp4",
        "run/run 0.mp4",
        "run/run 1.mp4",
    ]
    for card in cards:
        assert card["label"] == card["source"].split("/")[0] and card["frames"] == 10 and card["size"] == "96x64"
        encoded = card["picture"].removeprefix("data:image/webp;base64,")
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(int)
        assert strip.shape == (144, 4 * 108, 3)
        # To the right is red in the usual wheel.
        red, green, blue = np.median(strip[80:136, 16:92], axis=(0, 1))
        assert red > green + 30 and red > blue + 30
    assert "http://" not in page.read_text() and "https://" not in page.read_text()


def test_a_split_and_a_limit_choose_what_is_shown(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    assert main(["browse", str(data), str(page), "--split", "val"]) == 0
    assert {card["split"] for card in cards_of(page)} == {"val"}
    assert main(["browse", str(data), str(page), "--limit", "1", "--frames", "2"]) == 0
    assert [card["split"] for card in cards_of(page)] == ["train", "val"]


def test_a_damaged_sample_is_shown_with_its_reason(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shard = DataSet.open(copy).shards("train")[0].path
    with ShardReader(shard) as reader:
        _, offset, size = next(c for c in reader.components() if c[0].endswith("flow.mp4"))
        key = reader.key(0)
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    page = tmp_path / "sheet.html"
    assert main(["browse", str(copy), str(page)]) == 0
    assert "1 samples could not be decoded" in capsys.readouterr().err
    assert [card["key"] for card in cards_of(page) if "error" in card] == [key]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "sheet.html"], "nowhere"),
        (["DATA", "sheet.txt"], "sheet.txt does not end in .html or .htm"),
        (["DATA", "nofolder/sheet.html"], "nofolder is no folder"),
        (["DATA", "sheet.html", "--split", "tset"], "tset"),
        (["DATA", "sheet.html", "--frames", "0"], "--frames is 0"),
    ],
)
def test_p12_mistakes_are_one_sentence_and_leave_no_page(
    data: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused("browse", *(word.replace("DATA", str(data)) for word in arguments))
    assert not list(tmp_path.iterdir())


@needs_browser
def test_a_browser_shows_the_cards_and_searches_them(data: Path, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    browse(data, page)
    body = shown(page)
    assert body.count("<article>") == body.count('<img src="data:image/webp') == 4
    assert "4 of 4 samples" in body and 'value="run"' in body
    body = shown(page, "run%20val")
    assert body.count("<article>") == 1 and "1 of 4 samples" in body and "run/run" in body
    assert "Nothing matches" in shown(page, "absent") and "<article>" not in shown(page, "absent")


@needs_browser
def test_a_browser_pages_ten_thousand_samples_and_runs_nothing_that_a_name_says(tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    cards = (
        {
            "key": f"k{n}",
            "split": "train",
            "label": f"c{n % 400}",
            "shard": "s",
            "source": NASTY,
            "frames": 1,
            "seconds": 1,
            "size": "1x1",
            "picture": "data:image/webp;base64,AAAA",
        }
        for n in range(10_000)
    )
    write_page(page, NASTY, cards)
    body = shown(page)
    assert body.count("<article>") == 48 and "page 1 of 209" in body and "10000 of 10000 samples" in body
    assert body.count("<img ") == 48 and "&lt;/script&gt;&lt;img src=x" in body
    assert "111 of 10000 samples" in shown(page, "k77")  # k77, k770 to k779, k7700 to k7799
