"""`make claims`: the order of its runs, and what its page says of rows."""

from __future__ import annotations

import sys

from tiny import ROOT

sys.path.insert(0, f"{ROOT}/benchmarks")
import claims


def rows(form: str = "dann", **gains: float) -> list[dict[str, object]]:
    """Three seeds and two directions, each a point better than the one before; the systems differ by `gains`."""
    return [
        {"run": f"{form}/{task}/{system}/{seed}", "date": "2026-01-01", "seconds": 3600, "precision": "bf16",
         "source": 0.9, "ce": 0.25, "target": 0.5 + 0.01 * seed + gain * (1 + 0.1 * seed)}
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
    assert "| Rev2Net less I3D | 11.0 ± 0.4 | 6 | ahead, by more than two standard errors |" in text
    assert "| Rev2Net without DDP less I3D | -11.0 ± 0.4 | 6 | behind, by more than two standard errors |" in text
    assert "| without flow decoder | not run | not run |" in text and "without flow decoder less" not in text
    assert "| TSN, RGB | not run | not run | 0/0 |" in text
    assert "- Rev2Net as in the paper, less I3D: **11.0 ± 0.4 points on the other domain, 6 pairs** (ahead, by" in text
    both = claims.page([*rows(i3d=0.0), *rows("plain", i3d=0.1)])
    assert "| I3D, with DANN less without | -11.0 ± 0.4 | 6 | behind, by more than two standard errors |" in both
    level = claims.page(rows(i3d=0.0, rev2net=0.0))
    assert "| Rev2Net less I3D | 0.0 ± 0.0 | 6 | no difference beyond two standard errors |" in level


def test_the_recipe_is_judged_by_fresh_clips_and_seeds_alone() -> None:
    text = claims.page(rows(i3d=0.0, **{claims.RECIPE: 0.2}) + rows("fresh", i3d=0.0, **{claims.RECIPE: -0.1}))
    short, recipe = text.split("## ")[0], text.split("## The recipe")[1].split("## ")[0]
    assert "less I3D: **-11.0 ± 0.4 points on the other domain, 6 pairs** (behind, by" in short and "22.0" not in short
    assert "| -11.0 ± 0.4 | 6 | behind, by more than two standard errors |" in recipe and "seeds 5 to 9" in recipe
    fresh = [run for run in claims.plan() if run.form == "fresh"]
    assert {(run.system, run.seed) for run in fresh} == {(s, n) for s in ("i3d", claims.RECIPE) for n in range(5, 10)}
    assert {run.data("a").name for run in fresh} == {"a-fresh"} and len(fresh) == 20
