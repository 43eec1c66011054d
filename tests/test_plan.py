from dataclasses import replace

import pytest
import torch

from teal.foundation.errors import UserError
from teal.plan import SparsityPlan
from tests.helpers import plan_of
from tests.plans import DOWN, IDENTITY, K, Q, plan_with_path, plan_with_vectors, planned, rules_of


def test_plan_at_its_own_target_is_the_plan() -> None:
    assert all(plan.at(0.5) is plan for plan in (plan_with_path(), plan_with_vectors()))


@pytest.mark.parametrize("plan", [plan_with_path(), plan_with_vectors()], ids=["path", "no path"])
def test_plan_at_sparsity_zero_has_no_rules(plan: SparsityPlan) -> None:
    dense = plan.at(0.0)
    assert (rules_of(dense), dense.target_sparsity, dense.sparsity_budget) == ({}, 0.0, 0.0)
    assert list(dense.projections) == list(plan.projections)


def test_plan_at_a_point_of_the_path_has_the_rules_of_the_point() -> None:
    plan = plan_with_path()
    assert rules_of(plan.at(0.8)) == {
        Q: (0.8, plan.projections[Q].rule.threshold, ["score_scale", "shift"]),
        K: (0.8, 0.25, []),
        DOWN: (0.8, 0.75, ["shift"]),
    }


def test_plan_at_another_sparsity_keeps_the_whole_path() -> None:
    plan = plan_with_path()
    assert rules_of(plan.at(0.7).at(0.3)) == rules_of(plan.at(0.3))
    assert rules_of(plan.at(0.7).at(0.5)) == rules_of(plan)


def test_plan_without_a_path_refuses_other_sparsities_with_a_cure() -> None:
    with pytest.raises(UserError, match=r"rules of sparsity 0\.5; 0\.3 was .* Allocate a plan at"):
        plan_with_vectors().at(0.3)


def test_path_of_other_projections_is_refused() -> None:
    with pytest.raises(UserError, match="path is that of other projections"):
        replace(plan_with_path(), projections={Q: planned()})


def test_budget_is_the_mean_weighted_by_weight_size() -> None:
    assert plan_with_vectors().sparsity_budget == 0.5 * (32 + 8) / (32 + 8 + 64)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, float("nan")])
def test_target_that_is_no_fraction_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"^Target sparsity .* Give a fraction"):
        planned(sparsity)
    with pytest.raises(UserError, match=r"^Target sparsity .* Give a fraction"):
        plan_of(IDENTITY, {}, target_sparsity=sparsity)
    with pytest.raises(UserError, match=r"^Sparsity .* Give a fraction"):
        plan_with_path().at(sparsity)


def test_projection_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"names 'layers\.9\.q_proj', which its model does not have"
    ):
        plan_of(IDENTITY, {Q: planned(), "layers.9.q_proj": planned()})


@pytest.mark.parametrize("kind", ["score_scale", "shift"])
@pytest.mark.parametrize("shape", [(8,), (4, 1), ()], ids=str)
def test_vector_of_another_shape_than_the_input_is_refused(
    kind: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UserError, match=rf"The {kind} of {Q} has shape .* its input \(4,\)\. Make"):
        plan_of(IDENTITY, {Q: planned(threshold=1.0, **{kind: torch.ones(shape)})})
