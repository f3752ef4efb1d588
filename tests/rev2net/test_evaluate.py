"""The test protocol, its pictures, and what a person sees of a running training."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dataloaders.batch import ClipBatch
from dataloaders.errors import UserError
from rev2net import pictures
from rev2net.distributed import Ranks
from rev2net.evaluate import Metrics, Scores, decoder_errors, fuse, merge, metrics, score, score_lines
from rev2net.models import I3D, Rev2Net
from rev2net.progress import Profile, StepLog, duration

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=CPU)
CLASSES = 7


def batch(samples: Sequence[int], labels: Sequence[int], size: int = 32, seed: int = 0, flow: bool = True) -> ClipBatch:
    draw = torch.Generator().manual_seed(seed)
    n = len(samples)
    return ClipBatch(
        video=torch.rand(n, 3, 8, size, size, generator=draw) * 2 - 1,
        flow=torch.rand(n, 2, 8, size, size, generator=draw) * 2 - 1 if flow else None,
        label=torch.tensor(labels),
        sample=torch.tensor(samples),
        view=torch.zeros(n, dtype=torch.int64),
        keys=tuple(f"clip-{s}" for s in samples),
        sources=tuple(f"class/{s}.mp4" for s in samples),
    )


def small(flow: bool = True, frame: bool = True) -> Rev2Net:
    torch.manual_seed(0)
    return Rev2Net(I3D(CLASSES, width=0.03125), (8, 32, 32), flow_decoder=flow, frame_decoder=frame)


def table(rows: dict[int, tuple[int, list[float]]]) -> Scores:
    """Sample -> (label, scores of one view)."""
    scores = Scores()
    for sample, (label, row) in rows.items():
        scores.add(batch([sample], [label], 4), torch.tensor([row]))
    return scores


def ranking(*classes: int) -> list[float]:
    """Scores that put these classes first, in this order."""
    row = [0.0] * CLASSES
    for place, label in enumerate(classes):
        row[label] = 1.0 - 0.1 * place
    return row


def test_accuracy_against_a_count_by_hand() -> None:
    scores = table(
        {
            3: (0, ranking(0)),
            1: (0, ranking(1, 0)),
            4: (0, ranking(0, 1)),
            9: (1, ranking(6, 5, 4, 3, 1)),  # fifth
            2: (2, ranking(6, 5, 4, 3, 1, 2)),  # sixth
            5: (6, ranking(6)),
        }
    )
    result = metrics(scores, CLASSES)
    assert result.videos == 6
    assert result.top1 == pytest.approx(3 / 6)
    assert result.top5 == pytest.approx(5 / 6)
    assert result.mean_class == pytest.approx((2 / 3 + 0 + 0 + 1) / 4)  # classes 3, 4 and 5 have no video
    expected = np.zeros((CLASSES, CLASSES), int)
    for label, predicted in ((0, 0), (0, 1), (0, 0), (1, 6), (2, 6), (6, 6)):
        expected[label, predicted] += 1
    assert np.array_equal(result.confusion, expected)
    assert not result.failed
    true = (1.0, 0.9, 1.0, 0.6, 0.5, 1.0)  # the scores of the true classes
    assert result.cross_entropy == pytest.approx(-np.log(true).mean())
    scores.fail(2, 2, "damaged")
    assert metrics(scores, CLASSES).cross_entropy == pytest.approx(-np.log([*true[:4], true[5]]).mean())


def test_with_five_classes_or_fewer_every_video_is_in_the_top_five() -> None:
    scores = Scores()
    scores.add(batch([0, 1], [0, 1], 4), torch.tensor([[0.1, 0.9], [0.9, 0.1]]))
    result = metrics(scores, 2)
    assert (result.top1, result.top5) == (0.0, 1.0)


def test_views_are_averaged_over_a_video_wherever_they_come() -> None:
    scores = Scores()
    scores.add(batch([5, 2, 5], [1, 0, 1], 4), torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.2, 0.8]]))
    scores.add(batch([5], [1], 4), torch.tensor([[0.1, 0.9]]))
    samples, means, labels = scores.means()
    assert samples.tolist() == [2, 5] and labels.tolist() == [0, 1]
    np.testing.assert_allclose(means, np.array([[1, 0], [0.4, 0.6]]), atol=1e-7)
    assert metrics(scores, 2).top1 == 1.0


def test_p8_a_failed_video_counts_as_wrong_and_is_listed() -> None:
    scores = table({0: (0, ranking(0)), 1: (1, ranking(1)), 2: (1, ranking(1))})
    scores.fail(2, 1, "truncated")  # what its views scored before does not count
    scores.fail(7, 3, "no such codec")
    scores.fail(8, -1, "damaged json")
    result = metrics(scores, CLASSES)
    assert result.videos == 5
    assert result.top1 == result.top5 == pytest.approx(2 / 5)
    assert result.mean_class == pytest.approx((1 + 1 / 2 + 0) / 3)  # a video of no known class is in no class's mean
    assert result.confusion.sum() == 2
    assert result.failed == {2: "truncated", 7: "no such codec", 8: "damaged json"}
    told = result.of_classes()
    assert told["class_videos"] == [1, 2, 0, 1, 0, 0, 0]
    assert told["class_top1"] == [1.0, 0.5, None, 0.0, None, None, None]


def test_p8_a_split_of_failed_videos_alone_has_accuracy_zero() -> None:
    for label in (-1, 2):
        scores = Scores()
        scores.fail(0, label, "damaged")
        result = metrics(scores, 3)
        assert (result.top1, result.top5, result.mean_class, result.videos) == (0.0, 0.0, 0.0, 1)
    empty = metrics(Scores(), 3)
    assert (empty.top1, empty.mean_class, empty.videos) == (0.0, 0.0, 0)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_p2_ranks_together_score_what_one_rank_scores(world: int) -> None:
    draw = np.random.default_rng(0)
    rows = {s: (int(draw.integers(CLASSES)), draw.random(CLASSES).tolist()) for s in range(11)}
    whole, parts = table(rows), [table({s: rows[s] for s in range(r, 11, world)}) for r in range(world)]
    for scores in (whole, parts[20 % world]):
        scores.fail(20, 1, "damaged")
    together = metrics(merge(parts), CLASSES)
    expected = metrics(whole, CLASSES)
    assert np.array_equal(together.confusion, expected.confusion)
    assert replace(together, confusion=expected.confusion) == expected
    assert together.videos == 12


def test_two_streams_count_alike_whatever_their_views_and_a_failure_in_one_is_a_failure() -> None:
    rgb = table({0: (0, ranking(1, 0)), 1: (2, ranking(2)), 2: (3, ranking(3))})
    flow = table({0: (0, ranking(0, 1)), 1: (2, ranking(2)), 2: (3, ranking(3))})
    flow.add(batch([0], [0], 4), torch.tensor([ranking(0)]))  # its second view: 1.0, and 0.45 in the mean
    rgb.fail(1, 2, "broken")
    for one, other in ((rgb, flow), (flow, rgb)):
        fused = fuse(one, other)
        samples, means, labels = fused.means()
        assert (samples.tolist(), labels.tolist()) == ([0, 2], [0, 3])
        np.testing.assert_allclose(means[0, :2], [(0.9 + 1.0) / 2, (1.0 + 0.45) / 2], atol=1e-6)
        found = metrics(fused, CLASSES)
        assert (found.top1, found.videos, list(found.failed)) == (2 / 3, 3, [1])
    assert metrics(rgb, CLASSES).top1 == 1 / 3  # neither stream alone


def test_every_video_has_a_line_with_its_source_and_its_mean_scores() -> None:
    scores = Scores()
    scores.add(batch([5, 2, 5], [1, 0, 1], 4), torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.2, 0.8]]))
    scores.add(batch([3], [1], 4), torch.tensor([[0.5, 0.5]]))
    scores.fail(3, 1, "clip-3: truncated")
    scores.fail(6, 0, "clip-6: truncated", "class/6.mp4")
    scores.fail(7, -1, "clip-7: damaged json")
    assert [json.loads(line) for line in score_lines(scores, ("sit", "run"))] == [
        {"video": 2, "source": "class/2.mp4", "label": "sit", "predicted": "sit", "scores": [1.0, 0.0]},
        {"video": 3, "source": "class/3.mp4", "label": "run", "predicted": None, "error": "clip-3: truncated"},
        {"video": 5, "source": "class/5.mp4", "label": "run", "predicted": "sit", "scores": [0.55, 0.45]},
        {"video": 6, "source": "class/6.mp4", "label": "sit", "predicted": None, "error": "clip-6: truncated"},
        {"video": 7, "source": None, "label": None, "predicted": None, "error": "clip-7: damaged json"},
    ]
    assert not list(score_lines(Scores(), ("sit", "run")))


def test_p2_a_video_on_two_ranks_is_a_bug() -> None:
    part = table({0: (0, ranking(0))})
    failed = Scores()
    failed.fail(0, 0, "damaged")
    for other in (part, failed):
        with pytest.raises(AssertionError):
            merge([part, other])


def test_scores_are_the_softmax_of_the_network_s_logits() -> None:
    network = small().eval()
    clips = [batch([4, 1], [0, 3]), batch([4], [0], seed=1)]
    scores = score(network, iter(clips), device=CPU, precision="fp32")
    with torch.no_grad():
        first, second = (network.encoder(clip.video).softmax(1).double() for clip in clips)
    torch.testing.assert_close(torch.from_numpy(scores.sums[4]), first[0] + second[0], rtol=1e-5, atol=1e-6)
    assert scores.views == {4: 2, 1: 1}
    rounded = score(network, iter(clips), device=CPU, precision="bf16")
    np.testing.assert_allclose(rounded.sums[4], scores.sums[4], atol=0.02)
    assert not np.array_equal(rounded.sums[4], scores.sums[4])


class Broken(nn.Module):
    def forward(self, clip: Tensor) -> Tensor:
        logits = torch.zeros(len(clip), CLASSES)
        logits[0, 3] = float("nan")
        return logits


def test_scores_that_are_not_finite_are_wrong_and_not_class_0() -> None:
    scores = score(Broken(), [batch([0, 1], [0, 0])], device=CPU, precision="fp32")
    result = metrics(scores, CLASSES)
    assert result.top1 == 1 / 2 and result.videos == 2
    assert result.failed == {0: "the network's scores are not finite"}


def test_decoder_errors_are_in_pixels_and_stand_beside_knowing_nothing() -> None:
    network = small()
    clips = [batch([0, 1], [0, 1]), batch([2], [0], seed=1)]
    errors = decoder_errors(network, clips, ranks=ALONE, precision="fp32")
    video, flow = torch.cat([c.video for c in clips]), torch.cat([c.flow for c in clips if c.flow is not None])
    with torch.no_grad():
        output = network.eval().heads(video)
    assert output.flow is not None and output.frames is not None
    target = video.flip(2)
    expected = {
        "flow_epe": 20 * (output.flow - flow).square().sum(1).sqrt().mean(),
        "flow_epe_zero": 20 * flow.square().sum(1).sqrt().mean(),
        "flow_rmse": 20 * torch.stack([e.square().sum(0).mean().sqrt() for e in output.flow - flow]).mean(),
        "flow_rmse_zero": 20 * torch.stack([e.square().sum(0).mean().sqrt() for e in flow]).mean(),
        "frame_rmse": torch.stack([e.square().mean().sqrt() for e in output.frames - target]).mean(),
        "frame_rmse_mean": torch.stack([e.square().mean().sqrt() for e in video - video.mean(2, keepdim=True)]).mean(),
    }
    assert errors == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)
    assert set(decoder_errors(small(frame=False), clips, ranks=ALONE, precision="fp32")) == {
        "flow_epe",
        "flow_epe_zero",
        "flow_rmse",
        "flow_rmse_zero",
    }
    without_flow = [batch([0], [0], flow=False)]
    assert set(decoder_errors(small(flow=False), without_flow, ranks=ALONE, precision="bf16")) == {
        "frame_rmse",
        "frame_rmse_mean",
    }


def png_size(figure: Figure) -> tuple[int, int]:
    """Width and height of the figure as it is saved."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    header = file.getvalue()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize("classes", [2, 60, 101, 400])
def test_the_confusion_matrix_is_drawn_for_any_number_of_classes(classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 5, (classes, classes))
    counts[0] = 0  # a class without a video
    figure = pictures.confusion_matrix(counts, tuple(f"class {i}" for i in range(classes)), "a title")
    width, height = png_size(figure)
    assert 200 < width <= 900 and 200 < height <= 900
    axes = figure.axes[0]
    assert axes.get_title() == "a title"
    shares = axes.images[0].get_array()
    assert shares is not None and shares.shape == (classes, classes)
    assert float(shares[0].sum()) == 0 and float(shares[1].sum()) == pytest.approx(1)
    written = {text.get_text() for text in axes.texts}
    assert written == ({str(c) for c in counts[1] if c} if classes == 2 else set())
    assert ("class 1" in [label.get_text() for label in axes.get_yticklabels()]) == (classes <= 101)


def test_learning_curves_have_a_colour_for_each_seed_and_dashes_for_each_split() -> None:
    long = [(step, float(step % 2)) for step in range(10_000)]
    curves = {(seed, split): long for seed in ("0", "7") for split in (1, 2)}
    curves["7", 2] = [(1, float("nan")), (2, 0.5)]
    figure = pictures.learning_curves({"loss": curves, "top-1": {("0", 1): [(10, 0.5)]}})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["loss", "top-1"]
    a, b, c, d = first.lines
    assert a.get_color() == b.get_color() != c.get_color() == d.get_color()
    assert a.get_linestyle() == c.get_linestyle() != b.get_linestyle() == d.get_linestyle()
    # Means of parts: fewer points, the same mean.
    assert len(a.get_xdata()) == 200 and np.mean(a.get_ydata()) == pytest.approx(0.5, abs=0.01)
    assert list(d.get_xdata()) == [2] and list(second.lines[0].get_ydata()) == [0.5]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["seed 0, split 1", "seed 0, split 2", "seed 7, split 1", "seed 7, split 2"]


@pytest.mark.parametrize(
    ("flow", "frame", "rows"),
    [
        (True, True, ["input", "reconstruction\n(turned round)", "target flow", "predicted flow"]),
        (True, False, ["input", "target flow", "predicted flow"]),
        (False, True, ["input", "reconstruction\n(turned round)"]),
    ],
)
def test_the_decoders_picture_has_a_row_for_each_head(flow: bool, frame: bool, rows: list[str]) -> None:
    figure = pictures.decoders(small(flow, frame), batch([0, 1], [0, 1]), "a title", columns=4)
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == rows
    assert [axes.get_title() for axes in figure.axes[:4]] == ["frame 0", "frame 2", "frame 5", "frame 7"]
    width, height = png_size(figure)
    assert width >= 200 and height >= 100


def test_the_decoders_picture_shows_the_clip_and_its_reconstruction_side_by_side() -> None:
    network, clips = small(), batch([0], [0])
    figure = pictures.decoders(network, clips, "a title", columns=8)
    with torch.no_grad():
        frames = network.eval().heads(clips.video).frames
    assert frames is not None
    for t in (0, 3, 7):
        for row, tensor in ((0, clips.video[0, :, t]), (1, frames[0, :, 7 - t])):
            drawn = torch.from_numpy(np.asarray(figure.axes[8 * row + t].images[0].get_array())).permute(2, 0, 1)
            torch.testing.assert_close(drawn / 127.5 - 1, tensor, rtol=0, atol=1 / 255 + 1e-3)


def test_a_still_clip_has_a_white_flow_picture() -> None:
    clips = batch([0], [0])
    assert clips.flow is not None
    figure = pictures.decoders(
        small(frame=False), replace(clips, flow=torch.zeros_like(clips.flow)), "still", columns=2
    )
    drawn = np.asarray(figure.axes[2].images[0].get_array())
    assert (drawn[1:] == 255).all()


def test_pictures_of_a_long_run_do_not_pile_up() -> None:
    pictures.confusion_matrix(np.eye(2, dtype=int), ("a", "b"), "t")
    pictures.decoders(small(), batch([0], [0]), "t")
    assert plt.get_fignums() == []


@pytest.fixture
def step_log() -> Iterator[StepLog]:
    log = StepLog(total=5, first=0, batch=8, every=2, ranks=ALONE)
    yield log
    log.close()


def test_a_log_line_says_everything_every_n_steps_and_at_the_end(
    step_log: StepLog, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rev2net")
    results = []
    for step in range(1, 6):
        scalars = {"loss/ce": float(step), "loss/total": 10.0 * step}
        results.append(step_log.add(step, scalars, rate=step / 100, waited=0.0))
    assert [r is not None for r in results] == [False, True, False, True, True]
    averages = [(r["loss/ce"], r["loss/total"], r["lr"]) for r in results if r is not None]
    assert averages == [(1.5, 15.0, 0.02), (3.5, 35.0, 0.04), (5.0, 50.0, 0.05)]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert re.fullmatch(
        r"step 2/5 \(40%\)  ce 1\.5000 total 15\.0000  lr 2\.00e-02  \d+\.\d{3} s/step  wait 0\.0%  "
        r"\d+\.\d clips/s  \d+\.\d\d GiB  ETA \d+s",
        lines[0],
    )
    assert lines[-1].startswith("step 5/5 (100%)") and lines[-1].endswith("ETA 0s")


def test_the_log_measures_pace_and_waiting_of_its_own_interval(
    step_log: StepLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("rev2net.progress.time.perf_counter", lambda: now)
    log = StepLog(total=10, first=0, batch=8, every=2, ranks=ALONE)
    log.add(1, {}, 0.1, waited=1.0)
    now = 104.0
    first = log.add(2, {}, 0.1, waited=2.0)
    assert first is not None
    assert first["step_seconds"] == 2.0 and first["clips_per_second"] == 4.0 and first["data_wait_share"] == 0.5
    assert first["memory_gib"] > 0.01
    now = 105.0
    log.add(3, {}, 0.1, waited=2.0)
    second = log.add(4, {}, 0.1, waited=2.1)
    assert second is not None
    assert second["step_seconds"] == 0.5 and second["clips_per_second"] == 16.0
    assert second["data_wait_share"] == pytest.approx(0.1)
    log.add(5, {}, 0.1, waited=2.1)
    with log.paused():  # as for an evaluation
        now = 3705.0
    now = 3706.0
    third = log.add(6, {}, 0.1, waited=2.1)
    assert third is not None and third["step_seconds"] == 0.5


def test_the_rank_that_waits_for_data_the_longest_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three ranks, of which the others' values are made up."""
    caplog.set_level(logging.INFO, "rev2net")
    ranks = replace(ALONE, world_size=3)
    monkeypatch.setattr(Ranks, "gather", lambda _, own: [(0.0, 1.5, "n1"), (0.5, 2.5, "n7"), (0.1, 1.0, "n1")])
    values = StepLog(total=1, first=0, batch=8, every=2, ranks=ranks).add(1, {}, 0.1, waited=0.0)
    assert values is not None and values["data_wait_share"] == pytest.approx(0.2)
    assert (values["data_wait_share_max"], values["memory_gib"]) == (0.5, 2.5)
    assert "wait 20.0% (50.0% on rank 1, n7)  " in caplog.text


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0, 12.4, 59.6, 200, 3600, 3720, 90061)] == [
        "0s",
        "12s",
        "1m00s",
        "3m20s",
        "1h00m",
        "1h02m",
        "25h01m",
    ]


@pytest.mark.parametrize("steps", ["30-20", "20", "all", "0-3", "3-"])
def test_p12_a_range_of_steps_that_is_none_is_refused(steps: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^profile\.steps='{steps}' is not a range of steps: write FIRST-LAST"):
        Profile(steps, tmp_path)


def traced(folder: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads((folder / "profile.trace.json").read_text())["traceEvents"]}


def test_a_trace_holds_the_steps_asked_for_and_no_others(tmp_path: Path) -> None:
    profile = Profile("3-4", tmp_path)
    for done in range(1, 7):
        with torch.profiler.record_function(f"step {done}"):
            torch.ones(3).add_(1)
        profile.step(done)
        assert (tmp_path / "profile.trace.json").exists() == (done >= 4)
    assert {name for name in traced(tmp_path) if name.startswith("step ")} == {"step 3", "step 4"}


def test_a_trace_is_written_even_if_the_run_ends_in_its_middle(tmp_path: Path) -> None:
    profile = Profile("2-9", tmp_path)
    profile.step(1)
    torch.ones(3).add_(1)
    profile.close()
    assert any("add_" in name for name in traced(tmp_path))
    (tmp_path / "other").mkdir()
    off = Profile(None, tmp_path / "other")
    off.step(1)
    off.close()
    assert not list((tmp_path / "other").iterdir())


def test_metrics_are_shares() -> None:
    result = metrics(table({0: (0, ranking(0))}), CLASSES)
    assert isinstance(result, Metrics)
    assert (result.top1, result.top5, result.mean_class) == (1.0, 1.0, 1.0)
