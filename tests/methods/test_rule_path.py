import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teal.foundation.errors import UserError
from teal.methods import MaskRule
from teal.methods.rule_path import RulePath

EMPTY = torch.zeros(0, 2)
SCALE = torch.tensor([1.0, 2.0])


def path_of(**changes: object) -> RulePath:
    """Two projections: "a" rises from the first point on, "b", which has a score_scale, later."""
    fields = {
        "projections": ("a", "b"),
        "sparsities": torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64),
        "targets": torch.tensor([[0.0, 0.0], [0.4, 0.0], [0.6, 0.4]], dtype=torch.float64),
        "thresholds": torch.tensor([[-1.0, -1.0], [0.5, -1.0], [1.0, 0.25]]),
        "vectors": {"b": {"score_scale": SCALE}},
    }
    return RulePath(**{**fields, **changes})


def thresholds_at(path: RulePath, sparsity: float) -> list[float | None]:
    return [rule and rule.threshold for _, rule in path.at(sparsity).values()]


def test_points_are_given_exactly() -> None:
    assert thresholds_at(path_of(), 0.0) == [None, None]
    assert thresholds_at(path_of(), 0.2) == [0.5, None]
    assert thresholds_at(path_of(), 0.5) == [1.0, 0.25]


def test_targets_and_thresholds_between_points_lie_on_the_line() -> None:
    at = path_of().at(0.35)
    assert [target for target, _ in at.values()] == pytest.approx([0.5, 0.2])
    assert thresholds_at(path_of(), 0.35) == pytest.approx([0.75, 0.125])


def test_projection_without_a_rule_at_both_ends_has_none_between() -> None:
    assert thresholds_at(path_of(), 0.1) == [0.25, None]


def test_scale_stays_where_only_the_threshold_changes() -> None:
    for sparsity in (0.3, 0.5):
        _, rule = path_of().at(sparsity)["b"]
        assert rule.score_scale is SCALE


def test_endless_threshold_is_interpolated_without_nan() -> None:
    thresholds = torch.tensor([[-1.0, -1.0], [0.5, math.inf], [math.inf, math.inf]])
    path = path_of(thresholds=thresholds)
    for sparsity in (0.21, 0.35, 0.49):
        assert thresholds_at(path, sparsity) == [math.inf, math.inf]


def test_sparsity_beyond_the_end_is_refused_with_a_cure() -> None:
    with pytest.raises(UserError, match=r"ends at sparsity 0\.5, 0\.6 was asked for\. .*allocate"):
        path_of().at(0.6)


@given(st.floats(0, 0.5), st.floats(0, 0.5))
def test_thresholds_never_fall_with_more_sparsity(one: float, other: float) -> None:
    less, more = (thresholds_at(path_of(), sparsity) for sparsity in sorted((one, other)))
    for low, high in zip(less, more, strict=True):
        assert (low or 0.0) <= (high or 0.0)


def test_path_of_points_gives_back_the_points() -> None:
    points = {
        0.5: {"a": (0.6, MaskRule(threshold=0.1)), "b": (0.4, MaskRule(threshold=0.0))},
        0.0: {"b": (0.0, None), "a": (0.0, None)},
    }
    path = RulePath.from_points(points)
    assert path.end == 0.5
    for sparsity, planned in points.items():
        at = path.at(sparsity)
        for name, (target, rule) in planned.items():
            assert at[name][0] == target
            assert (at[name][1] and at[name][1].threshold) == (rule and rule.threshold)


def test_rules_whose_scale_changes_make_no_path() -> None:
    points = {
        0.0: {"a": (0.0, None)},
        0.2: {"a": (0.2, MaskRule(threshold=0.1, score_scale=SCALE))},
        0.4: {"a": (0.4, MaskRule(threshold=0.1, score_scale=2 * SCALE))},
    }
    assert RulePath.from_points(points) is None
    points[0.4] = {"a": (0.4, MaskRule(threshold=0.2, score_scale=SCALE.clone()))}
    assert RulePath.from_points(points).vectors == {"a": {"score_scale": SCALE}}


def test_path_comes_back_from_its_tensors() -> None:
    path = path_of()
    tensors = path.to_tensors("here")
    assert all(name.startswith("here.") for name in tensors)
    again = RulePath.from_tensors(path.projections, path.vectors, tensors, "here")
    assert again.to_tensors("here").keys() == tensors.keys()
    assert thresholds_at(again, 0.3) == thresholds_at(path, 0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"projections": ("a",)},
        {"thresholds": torch.zeros(2, 2)},
        {"targets": torch.zeros(3, 1)},
        {"sparsities": torch.tensor([0.0, 0.5, 0.2])},
        {"sparsities": torch.tensor([0.1, 0.2, 0.5])},
        {"sparsities": torch.tensor([0.0, 0.2, 1.0])},
        {"sparsities": torch.tensor([0.0, 0.2, math.nan])},
        {"sparsities": torch.zeros(3, 1)},
        {"sparsities": torch.zeros(0), "targets": EMPTY, "thresholds": EMPTY},
        {"targets": torch.full((3, 2), 0.5)},
    ],
    ids=[
        "a name is missing",
        "a threshold is missing",
        "a target is missing",
        "it falls",
        "it does not start at 0",
        "it reaches 1",
        "NaN",
        "sparsities in a table",
        "no point",
        "its start is not dense",
    ],
)
def test_tensors_that_are_no_path_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="the path"):
        path_of(**changes)
