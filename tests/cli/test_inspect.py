from dataclasses import replace
from pathlib import Path

import pytest

from teal.plan import SparsityPlan
from tests.cli.conftest import Teal


def test_plan_as_json_equals_the_plan(teal: Teal, workspace: Path) -> None:
    shown = teal("inspect", workspace / "plan", "--json").json
    plan = SparsityPlan.load(workspace / "plan")
    assert shown["sparsity_budget"] == pytest.approx(0.5)
    assert {name: entry["threshold"] for name, entry in shown["projections"].items()} == {
        name: planned.rule.threshold for name, planned in plan.projections.items()
    }


def test_plan_table_has_a_row_for_every_projection(teal: Teal, workspace: Path) -> None:
    out = teal("inspect", workspace / "plan").out
    assert all(name in out for name in SparsityPlan.load(workspace / "plan").projections)


def test_plan_shows_how_far_its_path_goes(teal: Teal, workspace: Path) -> None:
    shown = teal("inspect", workspace / "plan", "--json").json
    assert shown["path"] == {"points": 100, "end": 0.99}
    assert "from 0 to 99.0 %" in teal("inspect", workspace / "plan").out


def test_plan_without_a_path_says_so(teal: Teal, workspace: Path, tmp_path: Path) -> None:
    plan = replace(SparsityPlan.load(workspace / "plan"), path=None)
    plan.save(tmp_path / "plan")
    assert teal("inspect", tmp_path / "plan", "--json").json["path"] is None
    assert "path: none" in teal("inspect", tmp_path / "plan").out


def test_statistics_show_rising_quantiles(teal: Teal, workspace: Path) -> None:
    inputs = teal("inspect", workspace / "stats", "--json").json["inputs"]
    assert len(inputs) == 32
    for entry in inputs.values():
        quantiles = list(entry["quantiles"].values())
        assert quantiles == sorted(quantiles)
        assert entry["count"] == 1024
    assert "model.layers.7.down_input" in teal("inspect", workspace / "stats").out


def test_a_folder_without_an_artifact_is_refused(teal: Teal, tmp_path: Path) -> None:
    assert teal("inspect", tmp_path).is_error("neither plan.json nor stats.json")
