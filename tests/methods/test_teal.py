import pytest

from teal.methods.teal import Teal


class Recorded:
    """Quantiles that are their own argument, a little shifted."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def quantile(self, sparsity: float) -> float:
        self.asked.append(sparsity)
        return 2 * sparsity


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_threshold_is_the_quantile_of_the_magnitude_and_nothing_else_plays_a_part(
    sparsity: float,
) -> None:
    statistics = Recorded()
    rule = Teal().rule(statistics, sparsity)
    assert rule is not None
    assert (rule.threshold, dict(rule.vectors)) == (2 * sparsity, {})
    assert statistics.asked == [sparsity]


def test_sparsity_zero_asks_for_no_quantile() -> None:
    statistics = Recorded()
    assert Teal().rule(statistics, 0.0) is None
    assert not statistics.asked
