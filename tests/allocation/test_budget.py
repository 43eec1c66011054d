from typing import Any

import pytest

from teal.allocation.budget import plan_from_sparsities, target_projections
from teal.calibration import CalibrationStats, calibrate
from teal.foundation.errors import UserError
from tests.helpers import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return calibrate(tiny_model("llama"), tiny_tokens(2, 24))


def test_all_projections_are_planned_by_default(stats: CalibrationStats) -> None:
    assert len(target_projections(stats, None)) == 14


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param(["down_proj"], 2, id="ending"),
        pytest.param(["mlp.up_proj", "mlp.gate_proj"], 4, id="two endings"),
        pytest.param([r"model\.layers\.0\..*"], 7, id="regular expression"),
        pytest.param(["model.layers.1.self_attn.q_proj"], 1, id="whole name"),
    ],
)
def test_target_modules_choose_by_ending_or_expression(
    stats: CalibrationStats, targets: list[str], expected: Any
) -> None:
    assert len(target_projections(stats, targets)) == expected


@pytest.mark.parametrize("target", ["gate", "experts", "[", "proj"])
def test_a_target_that_matches_nothing_is_an_error(stats: CalibrationStats, target: str) -> None:
    with pytest.raises(UserError):
        target_projections(stats, [target])


def test_budget_counts_weights_not_projections(stats: CalibrationStats) -> None:
    names = target_projections(stats, ["k_proj", "up_proj"])
    sparsities = {name: 0.9 if name.endswith("k_proj") else 0.3 for name in names}
    plan = plan_from_sparsities(
        stats, sparsities, method="teal", strategy="uniform", target_sparsity=0.5
    )
    # Two k projections of 32×16 and two up projections of 32×48.
    assert plan.sparsity_budget == pytest.approx((0.9 * 16 + 0.3 * 48) / 64)


def test_zero_sparsity_has_no_rule(stats: CalibrationStats) -> None:
    names = target_projections(stats, None)
    plan = plan_from_sparsities(
        stats, dict.fromkeys(names, 0.0), method="teal", strategy="uniform", target_sparsity=0.0
    )
    assert all(planned.rule is None for planned in plan.projections.values())


def test_plan_without_other_budgets_has_no_path(stats: CalibrationStats) -> None:
    names = target_projections(stats, None)
    shared = {"method": "teal", "strategy": "uniform", "target_sparsity": 0.5}
    chosen = dict.fromkeys(names, 0.5)
    assert plan_from_sparsities(stats, chosen, **shared).path is None
    points = {0.0: dict.fromkeys(names, 0.0), 0.7: dict.fromkeys(names, 0.7)}
    path = plan_from_sparsities(stats, chosen, points=points, **shared).path
    assert path.sparsities.tolist() == [0.0, 0.5, 0.7]
