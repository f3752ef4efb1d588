from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dataloaders.errors import UserError
from dataloaders.plan import (
    _RGB_TO_YIQ,
    IDENTITY_COLOUR,
    Augment,
    ClipPlan,
    ClipShape,
    Views,
    flow_crop,
    train_plan,
    whole_video,
)
from dataloaders.plan import test_views as make_views
from dataloaders.shards import SampleInfo


def info(frames: int = 60, height: int = 256, width: int = 352, flow: tuple[int, int] | None = None) -> SampleInfo:
    return SampleInfo(
        key="k",
        label=0,
        class_name="a",
        source="s",
        num_frames=frames,
        fps=25.0,
        height=height,
        width=width,
        flow_height=flow[0] if flow else None,
        flow_width=flow[1] if flow else None,
    )


SHAPE = ClipShape(frames=16, height=112, width=112)
JITTER = Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def draw(
    video: SampleInfo,
    shape: ClipShape = SHAPE,
    augment: Augment = JITTER,
    *,
    seed: int = 0,
    epoch: int = 0,
    sample: int = 0,
) -> ClipPlan:
    return train_plan(video, shape, augment, seed=seed, epoch=epoch, sample=sample)


def test_p1_plans_stay_what_they_were() -> None:
    """Of another version too: a run that goes on under it would otherwise see other clips."""
    segments = ClipShape(frames=4, height=112, width=112, stride=3, segments=2)
    drawn = [draw(info(), shape, Augment(), seed=7, epoch=2, sample=n) for shape in (SHAPE, segments) for n in (0, 2)]
    assert [(plan.frames[0], plan.frames[-1], plan.crop, plan.flip) for plan in drawn] == [
        (34, 49, (0, 26, 256, 224), False),
        (26, 41, (0, 124, 256, 224), True),
        (21, 35, (12, 158, 192, 168), False),
        (16, 34, (62, 74, 192, 168), False),
    ]
    colour = draw(info(), seed=7, epoch=2).colour[:4]
    assert colour == pytest.approx((1.97315715303109, 0.2496879242577927, -0.3402620387202773, -47.347517052927536))


def test_p3_a_plan_is_a_function_of_seed_epoch_and_sample() -> None:
    keys = list(itertools.product(range(3), repeat=3))
    plans = [draw(info(), seed=seed, epoch=epoch, sample=sample) for seed, epoch, sample in keys]
    assert plans == [draw(info(), seed=seed, epoch=epoch, sample=sample) for seed, epoch, sample in keys]
    assert len(set(plans)) == len(plans)


@pytest.mark.parametrize(
    ("video", "shape"),
    [
        (info(), SHAPE),
        (info(frames=5, height=256, width=144), ClipShape(frames=8, height=64, width=96, stride=3)),
        (info(frames=16, height=2, width=3), SHAPE),
        (info(frames=1, height=112, width=112), SHAPE),
    ],
)
def test_plans_stay_inside_the_video(video: SampleInfo, shape: ClipShape) -> None:
    plans = [draw(video, shape, sample=i) for i in range(200)]
    plans += [*make_views(video, shape, 10, 3), whole_video(video, shape)]
    for plan in plans:
        top, left, height, width = plan.crop
        assert height >= 1 and width >= 1 and top >= 0 and left >= 0
        assert top + height <= video.height and left + width <= video.width
        assert all(0 <= frame < video.num_frames for frame in plan.frames)


def test_training_clips_cover_positions_sizes_and_flips() -> None:
    plans = [draw(info(frames=20), sample=i) for i in range(400)]
    assert {plan.frames[0] for plan in plans} == set(range(5))
    assert all(plan.frames == tuple(range(plan.frames[0], plan.frames[0] + 16)) for plan in plans)
    assert {plan.crop[2] for plan in plans} == {256, 224, 192, 168}
    for corner, side, length in ((0, 2, 256), (1, 3, 352)):
        assert min(plan.crop[corner] for plan in plans) == 0
        assert max(plan.crop[corner] + plan.crop[side] for plan in plans if plan.crop[side] < 256) == length
    assert 150 < sum(plan.flip for plan in plans) < 250


def test_short_videos_are_looped() -> None:
    (view,) = make_views(info(frames=3), ClipShape(frames=8, height=64, width=64), 1, 1)
    assert view.frames == (0, 1, 2, 0, 1, 2, 0, 1)
    assert {draw(info(frames=3), sample=i).frames[0] for i in range(50)} == {0, 1, 2}


def test_views_spread_over_time_and_the_long_side() -> None:
    plans = make_views(info(frames=61), SHAPE, 10, 3)
    assert [plan.frames[0] for plan in plans[::3]] == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert [plan.crop for plan in plans[:3]] == [(0, 0, 256, 256), (0, 48, 256, 256), (0, 96, 256, 256)]
    tall = make_views(info(height=352, width=256), SHAPE, 1, 3)
    assert [plan.crop[0] for plan in tall] == [0, 48, 96]
    (single,) = make_views(info(frames=60), SHAPE, 1, 1)
    assert single.frames[0] == 22 and single.crop == (0, 48, 256, 256)


@pytest.mark.parametrize("run", [1, 5])
@pytest.mark.parametrize("frames", [8, 9, 60, 61])
def test_segments_are_equal_parts_of_the_video_with_a_run_in_each(run: int, frames: int) -> None:
    """TSN, section 3.1; github: yjxiong/temporal-segment-networks draws the starts so."""
    shape = ClipShape(frames=4 * run, height=112, width=112, segments=4)
    possible = frames - run + 1
    seen: list[set[int]] = [set() for _ in range(4)]
    for sample in range(300):
        runs = np.array(draw(info(frames=frames), shape, sample=sample).frames).reshape(4, run)
        assert (np.diff(runs, axis=1) == 1).all()
        for k, start in enumerate(runs[:, 0].tolist()):
            seen[k].add(start)
    if possible >= 4:
        cuts = [k * possible // 4 for k in range(5)]
        assert seen == [set(range(cuts[k], cuts[k + 1])) for k in range(4)]
    assert max(map(max, seen)) + run <= frames
    (middle,) = make_views(info(frames=frames), shape, 1, 1)
    starts = middle.frames[::run]
    if possible >= 4:
        assert all(abs(start + 0.5 - (k + 0.5) * possible / 4) <= 1 for k, start in enumerate(starts))
    views = [view.frames[::run] for view in make_views(info(frames=frames), shape, 2, 1)]
    assert all(first <= second for first, second in zip(*views, strict=True))


def test_a_video_shorter_than_its_segments_is_looped() -> None:
    shape = ClipShape(frames=16, height=112, width=112, segments=8)
    for frames in (1, 2, 5):
        for plan in (draw(info(frames=frames), shape), *make_views(info(frames=frames), shape, 3, 1)):
            assert len(plan.frames) == 16 and set(plan.frames) <= set(range(frames))


def test_backwards_views_take_the_flow_that_leads_to_each_frame() -> None:
    (plan,) = make_views(info(frames=16), SHAPE, 1, 1, backwards=True)
    assert plan.frames == tuple(range(15, -1, -1))
    assert plan.flow_frames == (*range(14, -1, -1), 0)


def test_the_whole_video_is_looped_to_a_multiple_of_eight() -> None:
    assert whole_video(info(frames=20), SHAPE).frames == (*range(20), 0, 1, 2, 3)
    assert len(whole_video(info(frames=1), SHAPE).frames) == 8
    assert whole_video(info(frames=20), replace(SHAPE, stride=2)).frames == (*range(0, 20, 2), *range(0, 12, 2))


def test_jitter_is_linear_and_leaves_gray_gray() -> None:
    assert draw(info(), augment=Augment()).colour == IDENTITY_COLOUR
    for i in range(20):
        hue_only = np.reshape(draw(info(), augment=Augment(saturation=0.5, hue=0.5), sample=i).colour, (3, 4))
        np.testing.assert_allclose(hue_only @ [77.0, 77, 77, 1], [77.0] * 3, atol=1e-9)
        contrast = np.reshape(draw(info(), augment=Augment(contrast=0.5), sample=i).colour, (3, 4))
        np.testing.assert_allclose(contrast @ [127.5, 127.5, 127.5, 1], [127.5] * 3, atol=1e-9)
        brightness = np.reshape(draw(info(), augment=Augment(brightness=0.5), sample=i).colour, (3, 4))
        np.testing.assert_allclose(brightness, brightness[0, 0] * np.eye(3, 4), atol=1e-12)
        assert 0.5 <= brightness[0, 0] <= 1.5


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_draws_from_the_whole_range_of_its_strength(name: str) -> None:
    plans = [draw(info(), augment=Augment(**{name: 0.4}), sample=i) for i in range(200)]  # type: ignore[arg-type]
    colours = np.reshape([plan.colour for plan in plans], (200, 3, 4))
    red_green = _RGB_TO_YIQ @ colours[:, :, :3] @ np.linalg.inv(_RGB_TO_YIQ)[:, 1]  # where (Y, I, Q) = (0, 1, 0) goes
    drawn = {
        "brightness": colours[:, 0, 0],
        "contrast": 1 - colours[:, 0, 3] / 127.5,
        "saturation": np.hypot(red_green[:, 1], red_green[:, 2]),
        "hue": 1 + np.arctan2(red_green[:, 2], red_green[:, 1]) / (2 * np.pi),
    }[name]
    assert 0.6 - 1e-9 <= drawn.min() < 0.63 and 1.37 < drawn.max() <= 1.4 + 1e-9


def test_half_size_flow_is_cut_at_the_same_place() -> None:
    video = info(flow=(128, 176))
    for i in range(50):
        crop = draw(video, sample=i).crop
        assert tuple(2 * side for side in flow_crop(video, crop)) == crop
    odd = info(flow=(100, 176))
    top, left, height, width = flow_crop(odd, (0, 0, 256, 352))
    assert (top, left, height, width) == (0, 0, 100, 176)


@pytest.mark.parametrize("text", ["", "10", "0x3", "10x2", "x", "all", "-1x1"])
def test_p12_unknown_views_are_a_user_error(text: str) -> None:
    with pytest.raises(UserError, match="10x3"):
        Views.parse(text)


def test_views_are_read() -> None:
    assert Views.parse("10x3").count == 30 and Views.parse("1x1").count == 1
    assert Views.parse("whole").whole


def test_p12_augmentation_out_of_range_is_a_user_error() -> None:
    with pytest.raises(UserError, match="flip"):
        Augment(flip=2.0)
    with pytest.raises(UserError, match="scales"):
        Augment(scales=(1.5,))
