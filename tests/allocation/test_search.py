import pytest
from hypothesis import given
from hypothesis import strategies as st

from teal.allocation import search_sparsity
from teal.foundation.errors import UserError


@given(st.floats(0.01, 0.89))
def test_bisection_finds_the_edge_from_below(edge: float) -> None:
    steps = list(search_sparsity(lambda s: s - edge, 1e-12, resolution=0.005))
    best = max((step.sparsity for step in steps if step.is_within), default=0.0)
    assert edge - 0.005 <= best <= edge + 1e-12


def test_nothing_is_within_where_everything_hurts() -> None:
    assert not any(step.is_within for step in search_sparsity(lambda _: 1.0, 0.02))


@pytest.mark.parametrize("allowed", [0.0, -1.0, float("nan")])
def test_an_allowance_that_is_not_positive_is_refused(allowed: float) -> None:
    with pytest.raises(UserError, match=r"0\.02"):
        list(search_sparsity(lambda s: s, allowed))
