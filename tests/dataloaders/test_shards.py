from __future__ import annotations

import filecmp
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from wds2idx import IndexCreator

from dataloaders.errors import DecodeError, UserError
from dataloaders.shards import DataSet, SampleInfo, ShardReader, ShardWriter, index_path, write_manifest

INFO = SampleInfo(
    key="a-1", label=1, class_name="run", source="run/a b.avi", num_frames=9, fps=25.0, height=48, width=64
)


def samples(count: int = 7) -> dict[str, dict[str, bytes]]:
    rng = np.random.default_rng(0)
    made = {}
    for i in range(count):
        parts = {name: rng.bytes(int(rng.integers(1, 2000))) for name in ("mp4", "flow.mp4")}
        # Sizes at the edge of a tar block.
        parts["json"] = bytes(512 * (i % 2) + i % 3 - 1 if i % 2 else 512)
        made[f"clip_{i}-00"] = parts
    return made


def write(path: Path, content: dict[str, dict[str, bytes]]) -> ShardWriter:
    with ShardWriter(path) as writer:
        for key, parts in content.items():
            writer.write(key, parts)
    return writer


def manifest(**changes: object) -> dict[str, object]:
    shards = [{"file": "train-000000.tar", "samples": 7, "bytes": 1, "sha256": ""}]
    return {
        "format": 1,
        "classes": ["jump", "run"],
        "splits": {"train": {"samples": 7, "shards": shards}, "val": {"samples": 0, "shards": []}},
        "video": {"codec": "vp9"},
        "flow": {"scale": 0.5},
        **changes,
    }


def test_webdataset_alone_reads_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", samples())
    read = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False))
    assert {s["__key__"]: {k: v for k, v in s.items() if k[0] != "_"} for s in read} == samples()


def test_the_index_is_what_wds2idx_makes(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", samples())
    creator = IndexCreator(str(tmp_path / "s.tar"), str(tmp_path / "oracle.idx"), verbose=False)
    creator.create_index()
    creator.close()
    assert filecmp.cmp(index_path(tmp_path / "s.tar"), tmp_path / "oracle.idx", shallow=False)


def test_dali_reads_a_shard_through_its_index(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", samples())

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def pipeline() -> object:
        rgb, flow = fn.readers.webdataset(
            paths=[str(tmp_path / "s.tar")], index_paths=[str(tmp_path / "s.idx")], ext=["mp4", "flow.mp4"]
        )
        return rgb, flow

    pipe = pipeline()
    pipe.build()
    rgb, flow = pipe.run()
    for i, parts in enumerate(samples().values()):
        assert rgb.at(i).tobytes() == parts["mp4"]
        assert flow.at(i).tobytes() == parts["flow.mp4"]


def test_the_reader_returns_every_part_also_from_many_threads(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", samples())
    with ShardReader(tmp_path / "s.tar") as reader, ThreadPoolExecutor(8) as pool:
        assert [reader.key(i) for i in range(len(reader))] == list(samples())
        wanted = list(samples().values())
        turns = [i % 7 for i in range(700)]
        assert list(pool.map(reader.read, turns)) == [wanted[i] for i in turns]
        assert reader.read(3, ["json"]) == {"json": wanted[3]["json"]}


def test_the_same_samples_give_the_same_bytes_and_their_hash(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.tar", samples()), write(tmp_path / "b.tar", samples())
    assert filecmp.cmp(tmp_path / "a.tar", tmp_path / "b.tar", shallow=False)
    assert first.entry is not None and second.entry is not None
    assert first.entry.sha256 == second.entry.sha256
    assert first.entry.bytes == (tmp_path / "a.tar").stat().st_size
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uname, m.uid) for m in tar} == {(0, "rev2net", 0)}


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), ShardWriter(tmp_path / "s.tar") as writer:
        writer.write("a", {"mp4": b"x"})
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_names_the_sample(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", samples())
    data = (tmp_path / "s.tar").read_bytes()
    with ShardReader(tmp_path / "s.tar") as reader:
        last = reader.components()[-1]
    (tmp_path / "s.tar").write_bytes(data[: last[1] + last[2] - 1])
    with ShardReader(tmp_path / "s.tar") as reader:
        reader.read(5)
        with pytest.raises(DecodeError, match=r"^clip_6-00: s\.tar ends inside clip_6-00\.mp4$"):
            reader.read(6)


@pytest.mark.parametrize("damage", ["no tar", "no index", "cut index", "empty index"])
def test_p12_a_missing_or_damaged_index_is_one_sentence(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "s.tar", samples())
    index = tmp_path / "s.idx"
    if damage == "no tar":
        (tmp_path / "s.tar").unlink()
    elif damage == "no index":
        index.unlink()
    else:
        lines = index.read_bytes().splitlines(keepends=True)
        index.write_bytes(b"".join(lines[:-1]) if damage == "cut index" else b"")
    with pytest.raises(UserError, match="rev2net verify"):
        ShardReader(tmp_path / "s.tar")


def test_a_description_survives_its_json() -> None:
    assert SampleInfo.from_json("a-1", replace(INFO, sha256={"mp4": "00"}).to_json()) == INFO
    raw = json.loads(replace(INFO, sha256={"mp4": "00"}).to_json())
    assert raw["class"] == "run" and raw["sha256"] == {"mp4": "00"} and raw["flow_height"] is None
    for damaged in (b"", b"[]", b'{"label": 1}', b"\xff"):
        with pytest.raises(DecodeError, match=r"^a-1: damaged json"):
            SampleInfo.from_json("a-1", damaged)


def test_a_data_set_answers_from_its_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    data = DataSet.open(tmp_path)
    assert data.classes == ("jump", "run") and data.codec == "vp9"
    assert data.has_flow and data.flow_scale == 0.5
    assert data.splits == ("train", "val")
    assert [(s.path, s.samples) for s in data.shards("train")] == [(tmp_path / "train-000000.tar", 7)]
    assert (data.num_samples("train"), data.num_samples("val")) == (7, 0)
    before = data.fingerprint()
    assert DataSet.open(str(tmp_path)).fingerprint() == before
    write_manifest(tmp_path, manifest(flow=None))
    assert DataSet.open(tmp_path).fingerprint() != before
    assert DataSet.open(tmp_path).flow_scale is None


def test_p12_what_is_no_data_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        DataSet.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no dataset\.json"):
        DataSet.open(tmp_path)
    write_manifest(tmp_path, manifest(format=2))
    with pytest.raises(UserError, match="format 2, this version reads format 1"):
        DataSet.open(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        DataSet.open(tmp_path)
    write_manifest(tmp_path, manifest())
    with pytest.raises(UserError, match=r"no split 'test'; it has train, val"):
        DataSet.open(tmp_path).shards("test")


def test_the_reader_needs_no_scan_of_the_tar(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", samples())
    with ShardReader(tmp_path / "s.tar") as reader, tarfile.open(tmp_path / "s.tar") as tar:
        scanned = [(m.name, m.offset_data, m.size) for m in tar]
        assert reader.components() == scanned
        assert all(offset % 512 == 0 for _, offset, _ in scanned)
