from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dataloaders.batch import ClipRequest, RawClips
from dataloaders.dali_backend import DALIBackend
from dataloaders.errors import DecodeError, UserError
from dataloaders.shards import DataSet, SampleInfo, ShardWriter, write_manifest
from dataloaders.verify import add_verify_arguments, run_verify, verify
from dataloaders.video import Codec, Content, VideoEncoder

INFO = SampleInfo(
    key="k", label=0, class_name="run", source="k.avi", num_frames=5, fps=25.0, height=128, width=128,
    flow_height=64, flow_width=128,
)  # fmt: skip


def video(content: Content, count: int = 5, codec: Codec = "h264") -> bytes:
    encoder = VideoEncoder(codec, content, 128, 128, Fraction(25))
    for i in range(count):
        encoder.add(np.full((192, 128), 100 + i, np.uint8))
    return encoder.finish()


def make(
    folder: Path,
    info: SampleInfo = INFO,
    rgb: bytes | None = None,
    flow: bytes | None = None,
    codec: str = "h264",
) -> Path:
    parts = {"mp4": rgb or video("rgb"), "flow.mp4": flow or video("flow")}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    with ShardWriter(folder / "train-000000.tar") as writer:
        for key in ("a", "b"):
            writer.write(key, {**parts, "json": replace(info, sha256=hashes).to_json()})
    assert writer.entry is not None
    splits = {"train": {"samples": 2, "shards": [asdict(writer.entry)]}}
    write_manifest(
        folder,
        {
            "format": 1,
            "classes": ["run"],
            "splits": splits,
            "video": {"codec": codec},
            "flow": {"scale": 0.5},
        },
    )
    return folder


def test_a_whole_data_set_has_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    assert verify(tmp_path) == verify(tmp_path, deep=True) == []
    parser = argparse.ArgumentParser()
    add_verify_arguments(parser)
    assert run_verify(parser.parse_args([str(tmp_path), "--deep"])) == 0
    assert "train 2 samples, no problems" in capsys.readouterr().out
    (tmp_path / "train-000000.idx").unlink()
    assert run_verify(parser.parse_args([str(tmp_path)])) == 1


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_flow_that_is_not_tagged_full_range_is_refused(tmp_path: Path, codec: Codec) -> None:
    make(tmp_path, rgb=video("rgb", codec=codec), flow=video("rgb", codec=codec), codec=codec)
    problems = verify(tmp_path)
    assert len(problems) == 2 and all("a: flow is not tagged full range" in p for p in problems[:1])


def test_one_changed_byte_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    shard = tmp_path / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"mdat") + 400
    data[at] ^= 1
    shard.write_bytes(data)
    assert any("sha256 differs" in problem for problem in verify(tmp_path))


def test_a_shard_that_is_cut_short_or_gone_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    problems = verify(tmp_path)
    assert any("4000 bytes, the manifest says" in p for p in problems)
    assert any("does not match the tar" in p for p in problems)
    assert any("b: train-000000.tar ends inside" in p for p in problems)
    shard.unlink()
    assert "is missing" in verify(tmp_path)[0]


def test_an_index_of_another_tar_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    index = tmp_path / "train-000000.idx"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], lines[2], lines[1]]) + "\n")
    assert verify(tmp_path) == ["train-000000.tar: the index does not match the tar"]


@pytest.mark.parametrize("damage", [lambda b: b[:-30], lambda b: b[:-60], lambda b: b[:-9] + b"\xff" + b[-8:]])
def test_a_damaged_index_is_found(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    make(tmp_path)
    index = tmp_path / "train-000000.idx"
    index.write_bytes(damage(index.read_bytes()))
    assert verify(tmp_path) == [f"index {index} is damaged; run `rev2net verify {tmp_path}`"]


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        (replace(INFO, label=1), "label 1 is not class run"),
        (replace(INFO, class_name="jump"), "label 0 is not class jump"),
        (replace(INFO, num_frames=6), "RGB has 5 frames, expected 6"),
        (replace(INFO, width=144), "RGB is 128x128, expected 144x128"),
        (replace(INFO, flow_height=48), "flow is 128x128, expected 128x96"),
    ],
)
def test_a_description_that_does_not_fit_is_found(tmp_path: Path, info: SampleInfo, problem: str) -> None:
    make(tmp_path, info)
    assert any(problem in found for found in verify(tmp_path))


def test_a_class_without_samples_to_learn_from_is_found(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = json.loads((tmp_path / "dataset.json").read_bytes())
    manifest["classes"].append("jump")
    write_manifest(tmp_path, manifest)
    assert verify(tmp_path) == ["class jump has no sample in the split train"]


def test_the_codec_of_the_manifest_is_checked(tmp_path: Path) -> None:
    make(tmp_path, codec="vp9")
    assert any("RGB is h264, expected vp9" in found for found in verify(tmp_path))


def test_deep_decodes_every_frame(tmp_path: Path) -> None:
    whole = video("rgb")
    # The table of frames stays, the last frame's bytes go.
    last = whole.index(b"moov") - 4
    damaged = bytearray(whole)
    damaged[last - 12 : last] = bytes(12)
    make(tmp_path, rgb=bytes(damaged))
    assert verify(tmp_path) == []
    assert len(verify(tmp_path, deep=True)) == 2


def test_deep_decodes_with_the_decoder_of_training_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb, flow = video("rgb", 70, "vp9"), video("flow", 70, "vp9")
    make(tmp_path, replace(INFO, num_frames=70), rgb=rgb, flow=flow, codec="vp9")
    seen: list[int] = []
    real = DALIBackend.decode

    def decode(self: DALIBackend, requests: Sequence[ClipRequest]) -> RawClips:
        seen.extend(requests[0].plan.frames)
        return real(self, requests)

    monkeypatch.setattr(DALIBackend, "decode", decode)
    assert verify(tmp_path, deep=True) == []
    assert seen == 2 * list(range(70))

    def fail(self: DALIBackend, requests: Sequence[ClipRequest]) -> RawClips:
        raise DecodeError(requests[0].key, "NVDEC says no")

    monkeypatch.setattr(DALIBackend, "decode", fail)
    assert [p for p in verify(tmp_path, deep=True) if "NVDEC says no" in p] == [
        f"train-000000.tar: {key}: NVDEC says no" for key in ("a", "b")
    ]


def test_p12_a_folder_without_a_data_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json"):
        verify(tmp_path)
    assert not (tmp_path / "dataset.json").exists()
    with pytest.raises(UserError):
        DataSet.open(tmp_path / "x")
