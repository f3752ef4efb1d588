"""`make claims`: the order of its runs, and what its page says of rows."""

from __future__ import annotations

import sys

from tiny import ROOT

sys.path.insert(0, f"{ROOT}/benchmarks")
import claims


def rows(form: str = "dann", **gains: float) -> list[dict[str, object]]:
    """Three seeds and two directions, each a point better than the one before; the systems differ by `gains`."""
    return [
        {"run": f"{form}/{task}/{system}/{seed}", "date": "2026-01-01", "seconds": 3600, "steps": 480,
         "precision": "bf16", "source": 0.9, "ce": 0.25, "target": 0.5 + 0.01 * seed + gain * (1 + 0.1 * seed)}
        for seed in range(3) for task in claims.DIRECTIONS for system, gain in gains.items()
    ]  # fmt: skip


def test_the_runs_that_matter_most_come_first_and_none_comes_twice() -> None:
    names = [run.name for run in claims.plan()]
    assert len(set(names)) == len(names)
    assert names[:3] == ["dann/a-b/i3d/0", "dann/a-b/rev2net/0", "dann/a-b/no-ddp/0"]
    assert all(name.split("/")[2] in claims.MAIN and name.startswith("dann") for name in names[:30])
    assert names.index("real/skateboard/i3d/0") > names.index("dann/b-a/tsn-both/0")


def test_the_page_says_who_is_ahead_by_paired_differences() -> None:
    text = claims.page(rows(i3d=0.0, rev2net=0.1, **{"no-ddp": -0.1}))
    assert "18 of " in text and "3 seeds, 18.0 hours of one core" in text
    assert "| I3D | 51.0 ± 0.6 | 90.0 ± 0.0 | 0.25 | 51.0 ± 0.6 | 90.0 ± 0.0 | 0.25 | 3/3 |" in text
    each = "11.0 ± 0.6 | 11.0 ± 0.6"
    assert f"| Rev2Net less I3D | 11.0 ± 0.4 | {each} | 6 | ahead, beyond the 95 % interval |" in text
    assert "| Rev2Net without DDP less I3D | -11.0 ± 0.4 | -11.0" in text and "| 6 | behind, beyond the 95 % " in text
    assert "| without flow decoder | not run | not run |" in text and "without flow decoder less" not in text
    assert "| TSN, RGB | not run | not run | 0/0 |" in text
    assert (
        "less I3D on the other domain: **11.0 ± 0.4 points** of 6 pairs (a → b 11.0 ± 0.6, b → a 11.0 ± 0.6): ahead, "
        "beyond the 95 % interval. Training loss at the end 0.25 and 0.25, I3D's 0.25 and 0.25." in text
    )
    both = claims.page([*rows(i3d=0.0), *rows("plain", i3d=0.1)])
    assert "| I3D, with DANN less without | -11.0 ± 0.4 | -11.0 ± 0.6 | -11.0 ± 0.6 | 6 | behind, beyond" in both
    level = claims.page(rows(i3d=0.0, rev2net=0.0))
    assert "| Rev2Net less I3D | 0.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 | 6 | no difference beyond the 95 % int" in level


def test_differences_are_judged_by_student_s_interval() -> None:
    """Five of mean 1 and standard error 0.4: twice that excludes zero, and 2.78 times, which is Student's, does not."""
    even = [1 + 0.4 * 2**0.5 * x for x in (-2, -1, 0, 1, 2)]
    assert claims.spread(even) == "100.0 ± 40.0"
    assert claims.verdict(even) == "no difference beyond the 95 % interval"
    assert claims.verdict([0.8 * (x - 1) + 1 for x in even]) == "ahead, beyond the 95 % interval"
    assert claims.verdict([1.0, 1.1, 1.2, 1.3]) == "4 pairs, which is too few to say"


def test_two_streams_are_compared_with_those_that_were_fused() -> None:
    """Not with the row of a training of the same name on another machine."""
    streams = [
        {"run": f"dann/{task}/i3d-both/{seed}", "date": "2026-01-01", "target": 0.9, "precision": "fp32",
         "rgb": 0.6, "flow": 0.8 + seed / 100, "seconds": 3600}
        for task in claims.DIRECTIONS for seed in range(3)
    ]  # fmt: skip
    text = claims.page([*rows(i3d=0.2), *streams])
    assert "6 of " in text and "12.0 hours of one core" in text
    part = text.split("## Inputs across domains")[1].split("## ")[0]
    assert "tested together (6 in fp32)" in part
    assert "| I3D | 60.0 ± 0.0 | 60.0 ± 0.0 | 3/3 |" in part and "| I3D, flow | 81.0 ± 0.6 | 81.0 ± 0.6 | 3/3 |" in part
    assert "| I3D, RGB + flow less I3D | 30.0 ± 0.0 |" in part and "| I3D, flow less I3D | 21.0 ± 0.4 |" in part
    assert "| I3D on RGB, made again, less its row above | -13.0 ± 1.1 |" in part


def test_the_recipe_is_judged_by_fresh_clips_and_seeds_alone() -> None:
    text = claims.page(rows(i3d=0.0, **{claims.RECIPE: 0.2}) + rows("fresh", i3d=0.0, **{claims.RECIPE: -0.1}))
    short, recipe = text.split("## ")[0], text.split("## The recipe")[1].split("## ")[0]
    assert "less I3D on the other domain: **-11.0 ± 0.4 points** of 6 pairs" in short and "22.0" not in short
    assert "| -11.0 ± 0.4 | -11.0 ± 0.6 | -11.0 ± 0.6 | 6 | behind, " in recipe and "seeds 5 to 9" in recipe
    fresh = [run for run in claims.plan() if run.form == "fresh"]
    assert {(run.system, run.seed) for run in fresh} == {(s, n) for s in ("i3d", claims.RECIPE) for n in range(5, 10)}
    assert {run.data("a").name for run in fresh} == {"a-fresh"} and len(fresh) == 20
