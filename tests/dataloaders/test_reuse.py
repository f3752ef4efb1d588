from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import contents, make_source, moving, write_video

import dataloaders.prepare
from dataloaders.classmap import ClassMap
from dataloaders.errors import UserError
from dataloaders.prepare import prepare, prepare_share
from dataloaders.reuse import open_donors
from dataloaders.shards import DataSet, write_manifest
from dataloaders.sources import SourceListing, read_folder
from dataloaders.transcode import PrepareSettings

SETTINGS = PrepareSettings(short_side=64, shard_bytes=20_000)
OTHER_ORDER = PrepareSettings(short_side=64, seed=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("reuse") / "in")


@pytest.fixture(scope="module")
def donor(source: Path) -> Path:
    out = source.with_name("donor")
    prepare(read_folder(source, val_fraction=0.3), out, SETTINGS)
    return out


@pytest.fixture
def transcoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that are made, not taken over."""
    names: list[str] = []
    real = dataloaders.prepare.transcode
    monkeypatch.setattr(
        dataloaders.prepare, "transcode", lambda clip, settings: (names.append(clip.relative), real(clip, settings))[1]
    )
    return names


def another_split(source: Path) -> SourceListing:
    return read_folder(source, val_fraction=0.5, seed=1)


def other_classes(source: Path) -> SourceListing:
    return ClassMap(classes=("sit", "hop"), sources={"jump": "hop", "run": "sit"}).apply(read_folder(source))


@pytest.mark.parametrize("cut", [another_split, other_classes])
def test_another_cut_of_the_same_videos_has_the_bytes_it_would_have_from_scratch(
    tmp_path: Path, source: Path, donor: Path, transcoded: list[str], cut: Callable[[Path], SourceListing]
) -> None:
    prepare(cut(source), tmp_path / "a", OTHER_ORDER)
    assert len(transcoded) == 6
    transcoded.clear()
    before = contents(donor)
    prepare(cut(source), tmp_path / "b", OTHER_ORDER, reuse=open_donors([donor], OTHER_ORDER))
    assert transcoded == []
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(donor) == before


def test_what_no_donor_holds_whole_is_made(
    tmp_path: Path, source: Path, donor: Path, transcoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "in")
    write_video(tmp_path / "in/run/run 1.mp4", moving(9, 64, 80))  # another video of the same name
    write_video(tmp_path / "in/run/new.mp4", moving(6, 64, 80))
    shutil.copytree(donor, tmp_path / "donor")
    shard = DataSet.open(tmp_path / "donor").shards("train")[0]
    with shard.open() as reader:
        key = reader.key(0)
        name, offset, _ = next(entry for entry in reader.components() if entry[0].endswith(".flow.mp4"))
    with shard.path.open("r+b") as tar:  # a byte of a flow video has flipped
        tar.seek(offset + 100)
        byte = tar.read(1)[0]
        tar.seek(offset + 100)
        tar.write(bytes([byte ^ 1]))
    assert name.startswith(key)
    listing = read_folder(tmp_path / "in")
    damaged = next(clip.relative for clip in listing.clips if clip.key == key)
    prepare(listing, tmp_path / "a", SETTINGS)
    transcoded.clear()
    donors = open_donors([tmp_path / "donor"], SETTINGS)
    for share in ((2, 2), (1, 2)):
        prepare_share(listing, tmp_path / "b", SETTINGS, share, reuse=donors)
    assert sorted(transcoded) == sorted({"run/new.mp4", "run/run 1.mp4", damaged})
    assert "clips are taken over" in capsys.readouterr().err
    prepare(listing, tmp_path / "b", SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PrepareSettings(short_side=80), r"other settings: short_side 64 \(here 80\); prepare with the same"),
        (PrepareSettings(short_side=64, flow_scale=None), r"other settings: flow_scale 0.5 \(here None\)"),
    ],
)
def test_p12_samples_of_other_settings_are_refused(donor: Path, settings: PrepareSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_donors([donor], settings)
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_donors([donor, donor / "nowhere"], SETTINGS)


def test_p12_a_data_set_that_does_not_say_its_settings_is_refused(tmp_path: Path, donor: Path) -> None:
    shutil.copytree(donor, tmp_path / "donor")
    manifest = json.loads((donor / "dataset.json").read_bytes())
    del manifest["settings"]
    write_manifest(tmp_path / "donor", manifest)
    with pytest.raises(UserError, match="does not say how the videos were prepared"):
        open_donors([tmp_path / "donor"], SETTINGS)
