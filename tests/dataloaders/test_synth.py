"""Generated clips: reproducible, and the class is in the motion alone."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from dataloaders.errors import UserError
from dataloaders.flow import tvl1
from dataloaders.scenes import CLASSES, DOMAINS, MOTIONS, OPPOSITE, TORUS, SynthSettings, draw_scene, state_at, times
from dataloaders.synth import add_synth_arguments, render, run_synth, synthesise, write_clip

SMALL = SynthSettings(size=48, frames=6)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.mp4"))
    }


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_synth_arguments(parser)
    return run_synth(parser.parse_args(list(arguments)))


@pytest.mark.parametrize("domain", list(DOMAINS))
@pytest.mark.parametrize("name", CLASSES)
def test_a_clip_played_backwards_is_the_opposite_class_pixel_by_pixel(domain: str, name: str) -> None:
    settings = SynthSettings(domain=domain, size=64, frames=7)
    scene = draw_scene(settings, "train", name, 3)
    forwards = render(scene, name, size=64)
    assert forwards.shape == (7, 64, 64, 3) and forwards.dtype == np.uint8
    assert np.array_equal(forwards[::-1], render(scene, OPPOSITE[name], size=64))
    assert np.abs(forwards[0].astype(int) - forwards[-1]).mean() > 1


def test_the_eight_classes_are_four_pairs_of_opposites() -> None:
    assert len(CLASSES) == 8
    assert all(OPPOSITE[OPPOSITE[name]] == name != OPPOSITE[name] for name in CLASSES)


@pytest.mark.parametrize("axis", ["x", "y", "angle", "size"])
def test_objects_are_spread_alike_in_the_first_and_the_last_frame_of_every_class(axis: str) -> None:
    """Quarters of the torus or circle hold a quarter of the objects each, whatever the class and the time."""
    settings = SynthSettings(size=32, frames=24)
    scenes = [draw_scene(settings, "train", "any", i) for i in range(150)]
    for name in CLASSES:
        for slot in (0, -1):
            states = [state_at(scene, name, times(24, MOTIONS[name][1])[slot]) for scene in scenes]
            values = {
                "x": np.concatenate([s.positions[:, 0] / TORUS for s in states]),
                "y": np.concatenate([s.positions[:, 1] / TORUS for s in states]),
                "angle": np.concatenate([s.angles / (2 * np.pi) % 1 for s in states]),
                "size": np.concatenate([s.sizes for s in states]),
            }[axis]
            shares = np.histogram(values, bins=4, range=(0, 1))[0] / len(values)
            # Four standard deviations of independent draws; the lattice spreads them more evenly than that.
            assert np.abs(shares - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(values)), (name, slot)


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_objects_of_each_domain_move_as_fast_as_documented(domain: str) -> None:
    scenes = [draw_scene(SynthSettings(domain=domain, size=32), "train", "any", i) for i in range(60)]
    speeds = [float(np.hypot(*scene.velocity)) * 128 for scene in scenes]
    assert 2 <= min(speeds) < 2.4 and 3.6 < max(speeds) <= 4
    turns = np.degrees(np.concatenate([scene.rotation for scene in scenes]))
    assert 5 <= turns.min() < 5.5 and 9.5 < turns.max() <= 10
    growths = [scene.growth for scene in scenes]
    assert 0.03 <= min(growths) < 0.032 and 0.048 < max(growths) <= 0.05


def features_of_flow(clip: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Robust summary of one flow: histograms of u, v, divergence and curl."""
    u, v = tvl1(clip.mean(axis=3).astype(np.uint8)[:2])[0]
    divergence = np.gradient(u, axis=1) + np.gradient(v, axis=0)
    curl = np.gradient(v, axis=1) - np.gradient(u, axis=0)
    edges = np.array([-1e9, -2.5, -1.5, -0.7, 0.7, 1.5, 2.5, 1e9])
    fine = np.array([-1e9, -0.15, -0.08, -0.03, 0.03, 0.08, 0.15, 1e9])
    parts = [np.histogram(u, edges)[0], np.histogram(v, edges)[0]]
    parts += [np.histogram(divergence, fine)[0], np.histogram(curl, fine)[0]]
    summary: npt.NDArray[np.float64] = np.sqrt(np.concatenate(parts) / u.size)
    return summary


def held_out_accuracy(features: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    """Ridge regression on one-hot labels, trained on two thirds."""
    train = np.arange(len(labels)) % 3 != 0
    mean, scale = features[train].mean(0), features[train].std(0) + 1e-6
    x = np.concatenate([(features - mean) / scale, np.ones((len(labels), 1))], axis=1)
    gram = x[train].T @ x[train] + 10 * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[train].T @ np.eye(len(CLASSES))[labels[train]])
    return float(((x[~train] @ weights).argmax(1) == labels[~train]).mean())


def test_one_frame_does_not_tell_the_class_but_two_do() -> None:
    settings = SynthSettings(size=64, frames=2)
    per_class = 45
    clips, labels = [], []
    for label, name in enumerate(CLASSES):
        for i in range(per_class):
            clips.append(render(draw_scene(settings, "train", name, i), name, size=64))
            labels.append(label)
    answers = np.array(labels)
    still = np.stack([clip[0].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3, 4)).ravel() for clip in clips])
    energy = np.stack([np.abs(np.fft.rfft2(clip[0].mean(axis=2)))[:6, :6].ravel() for clip in clips])
    chance, held_out = 1 / len(CLASSES), len(labels) / 3
    limit = chance + 4 * np.sqrt(chance * (1 - chance) / held_out)
    assert held_out_accuracy(still, answers) < limit
    assert held_out_accuracy(np.log(energy + 1), answers) < limit
    moving = np.stack([features_of_flow(clip) for clip in clips])
    assert held_out_accuracy(moving, answers) > 2 * limit


def test_the_domains_look_different() -> None:
    saturation: dict[str, list[float]] = {}
    for domain in DOMAINS:
        settings = SynthSettings(domain=domain, size=64, frames=2)
        frames = [render(draw_scene(settings, "train", n, 0), n, size=64)[0].astype(float) for n in CLASSES]
        saturation[domain] = [float((f.max(2) - f.min(2)).mean()) for f in frames]
    assert np.mean(saturation["a"]) > 1.5 * np.mean(saturation["b"])
    a = draw_scene(SynthSettings(domain="a"), "train", "left", 0)
    b = draw_scene(SynthSettings(domain="b"), "train", "left", 0)
    assert not np.array_equal(a.positions[:4], b.positions[:4])


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "val"}, {"name": "right"}, {"index": 1}])
def test_seed_split_class_and_index_each_change_the_scene(other: dict[str, int | str]) -> None:
    def background(seed: int = 0, split: str = "train", name: str = "left", index: int = 0) -> npt.NDArray[np.float32]:
        return draw_scene(SynthSettings(size=48, frames=2, seed=seed), split, name, index).background

    assert np.array_equal(background(), background())
    assert not np.array_equal(background(), background(**other))  # type: ignore[arg-type]


def test_clips_do_not_depend_on_their_number_nor_on_the_processes(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    synthesise(few, SMALL, {"train": 1, "val": 0}, workers=1)
    synthesise(many, SMALL, {"train": 2, "val": 1}, workers=2)
    first, second = digests(few), digests(many)
    assert len(first) == 8 and len(second) == 24
    assert first == {key: second[key] for key in first}
    assert len(set(second.values())) == 24


def test_an_interrupted_run_goes_on_and_a_finished_one_does_nothing(tmp_path: Path) -> None:
    counts = {"train": 1, "val": 0}
    assert synthesise(tmp_path / "clips", SMALL, counts, workers=1) == 8
    before = digests(tmp_path / "clips")
    (tmp_path / "clips/train/up/up_0000.mp4").unlink()
    assert synthesise(tmp_path / "clips", SMALL, counts, workers=1) == 1
    assert synthesise(tmp_path / "clips", SMALL, counts, workers=1) == 0
    assert digests(tmp_path / "clips") == before


def test_the_command_writes_videos_of_the_asked_form(tmp_path: Path) -> None:
    out = tmp_path / "clips"
    options = ["--clips-per-class", "1", "--val-per-class", "0", "--size", "48", "--frames", "5", "--fps", "12"]
    assert run(str(out), *options, "--workers", "1", "--domain", "b") == 0
    assert sorted(p.name for p in (out / "train").iterdir()) == sorted(CLASSES)
    settings = SynthSettings(domain="b", size=48, frames=5, fps=12)
    rendered = render(draw_scene(settings, "train", "recede", 0), "recede", size=48)
    with av.open(str(out / "train/recede/recede_0000.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
        stored = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert stored.shape == rendered.shape
    assert np.abs(stored.astype(int) - rendered).mean() < 8


def test_a_clip_s_path_is_no_address_and_nothing_is_left_of_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run:1").mkdir()
    frames = np.zeros((2, 48, 48, 3), np.uint8)
    write_clip(Path("run:1/clip.mp4"), frames, 25)
    with pytest.raises(ValueError, match="float32"):
        write_clip(Path("run:1/bad.mp4"), frames.astype(np.float32), 25)
    assert [path.name for path in Path("run:1").iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--size", "33"], "even"),
        (["--frames", "1"], "frames"),
        (["--seed", "-1"], "seed"),
        (["--clips-per-class", "0", "--val-per-class", "0"], "clips per class"),
        (["--workers", "0"], "workers"),
        (["--fps", "0"], "fps"),
    ],
)
def test_p12_options_that_make_no_clips_are_refused_in_one_sentence(
    tmp_path: Path, options: list[str], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        run(str(tmp_path / "clips"), *options)
    assert not (tmp_path / "clips").exists()


def test_p12_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="something else"):
        synthesise(tmp_path, SMALL, {"train": 1}, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xff", b"[1]", b"no json"])
def test_p12_a_damaged_or_foreign_record_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "synth.json").write_bytes(content)
    with pytest.raises(UserError, match=r"(is damaged|other settings).*choose another folder"):
        synthesise(tmp_path, SMALL, {"train": 1}, workers=1)


def test_p12_clips_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    synthesise(tmp_path / "clips", SMALL, {"train": 1}, workers=1)
    with pytest.raises(UserError, match="other settings"):
        synthesise(tmp_path / "clips", SynthSettings(size=48, frames=6, seed=1), {"train": 1}, workers=1)
