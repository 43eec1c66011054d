import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal.calibration.histogram import HIGHEST, LOWEST, NUM_BINS, Histogram
from teal.foundation.errors import UserError

SPARSITIES = [0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99]
DISTRIBUTIONS = {
    "normal": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "student_t_2": torch.distributions.StudentT(2.0),
    "lognormal": torch.distributions.LogNormal(0.0, 1.0),
}
# What bfloat16 can hold inside the bins, and zero.
BFLOAT16_VALUES = st.lists(
    st.one_of(
        st.just(0.0),
        st.floats(-(2.0**19), -(2.0**-43), width=32),
        st.floats(2.0**-43, 2.0**19, width=32),
    ),
    min_size=1,
    max_size=40,
)


def sample(distribution: str, scale: float = 1.0, number: int = 200_000) -> Tensor:
    torch.manual_seed(0)
    return DISTRIBUTIONS[distribution].sample((number,)) * scale


def histogram_of(values: Tensor) -> Histogram:
    histogram = Histogram(str(values.dtype).removeprefix("torch."))
    histogram.add(values)
    return histogram


def dropped(values: Tensor, threshold: float) -> float:
    return float((values.float().abs() <= threshold).double().mean())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_quantiles_reach_their_sparsity_within_a_tenth_of_a_point(
    distribution: str, scale: float
) -> None:
    values = sample(distribution, scale)
    histogram = histogram_of(values)
    for sparsity in SPARSITIES:
        assert dropped(values, histogram.quantile(sparsity)) == pytest.approx(sparsity, abs=1e-3)


@settings(deadline=None)
@given(BFLOAT16_VALUES, st.floats(0.0, 0.999))
def test_bfloat16_quantile_reaches_the_nearest_sparsity_there_is(
    numbers: list[float], sparsity: float
) -> None:
    values = torch.tensor(numbers).bfloat16()
    reached = dropped(values, histogram_of(values).quantile(sparsity))
    achievable = [dropped(values, t) for t in [0.0, LOWEST, *values.float().abs().tolist()]]
    assert abs(reached - sparsity) <= min(abs(s - sparsity) for s in achievable) + 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0], ids=["subnormal", "unit", "large"])
def test_float16_quantile_is_within_a_tenth_of_a_point_of_the_nearest_sparsity(
    scale: float,
) -> None:
    values = sample("laplace", scale).half()
    histogram = histogram_of(values)
    levels = values.float().abs().unique()
    achievable = torch.searchsorted(values.float().abs().sort()[0], levels, right=True)
    achievable = achievable.double() / len(values)
    for sparsity in SPARSITIES:
        reached = dropped(values, histogram.quantile(sparsity))
        nearest = float((achievable - sparsity).abs().min())
        assert abs(reached - sparsity) <= nearest + 1e-3


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_bfloat16_threshold_drops_the_same_share_of_a_float32_run(sparsity: float) -> None:
    values = sample("normal")
    threshold = histogram_of(values.bfloat16()).quantile(sparsity)
    assert dropped(values, threshold) == pytest.approx(
        dropped(values.bfloat16(), threshold), abs=1e-5
    )


def test_quantile_among_exact_zeros_is_zero() -> None:
    values = torch.cat([torch.zeros(60), torch.ones(40)]).bfloat16()
    assert histogram_of(values).quantile(0.5) == 0.0
    assert 0.0 < histogram_of(values).quantile(0.7) < 1.0 <= histogram_of(values).quantile(0.9)


def test_quantile_beyond_the_bins_is_their_end() -> None:
    assert histogram_of(torch.full((10,), 1e30)).quantile(0.5) == HIGHEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cdf_agrees_with_the_values_at_every_threshold(dtype: torch.dtype) -> None:
    values = sample("laplace").to(dtype)
    histogram = histogram_of(values)
    for threshold in [0.0, 1e-3, 0.1, 0.5, 1.0, 1.003, 3.14159, 20.0]:
        assert histogram.cdf(threshold) == pytest.approx(dropped(values, threshold), abs=1e-3)


def test_cdf_is_zero_below_all_and_one_at_infinity() -> None:
    histogram = histogram_of(torch.tensor([0.0, 1.0, 1e30]))
    assert histogram.cdf(-1e-30) == 0.0
    assert histogram.cdf(0.0) == pytest.approx(1 / 3)
    assert histogram.cdf(1e29) == pytest.approx(2 / 3)
    assert histogram.cdf(math.inf) == 1.0


@settings(deadline=None)
@given(st.floats(0.0, 2.0**100, width=32))
def test_a_value_is_counted_between_the_edges_of_its_bin(value: float) -> None:
    histogram = histogram_of(torch.tensor([-value]))
    (index,) = histogram.counts.nonzero().flatten().tolist()
    assert histogram.edges[index] <= value < histogram.edges[index + 1]
    assert len(histogram.edges) == NUM_BINS + 1


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=50), st.integers(0, 50))
def test_merging_two_parts_equals_one_pass(numbers: list[float], cut: int) -> None:
    values = torch.tensor(numbers)
    merged = histogram_of(values[:cut]).merge(histogram_of(values[cut:]))
    assert torch.equal(merged.counts, histogram_of(values).counts)


def test_more_values_than_one_chunk_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.calibration.histogram._CHUNK", 7)
    values, weights = sample("normal", number=100), torch.arange(100.0)
    histogram = Histogram()
    histogram.add(values, weights)
    assert histogram.total == weights.sum()
    assert histogram.cdf(0.5) == pytest.approx(
        float(weights[values.abs() <= 0.5].sum() / weights.sum()), abs=1e-3
    )


def test_occupied_part_rebuilds_the_histogram() -> None:
    histogram = histogram_of(sample("student_t_2", number=100))
    first, counts = histogram.occupied()
    rebuilt = Histogram.from_counts("float32", first, counts)
    assert counts[0] > 0 and counts[-1] > 0
    assert torch.equal(rebuilt.counts, histogram.counts)


@pytest.mark.parametrize(
    ("first_bin", "counts"),
    [
        (-1, torch.ones(3)),
        (NUM_BINS - 2, torch.ones(3)),
        (0, torch.ones(3, 3)),
        (0, torch.tensor([1.0, -1.0])),
        (0, torch.tensor([math.nan])),
    ],
    ids=["before", "behind", "matrix", "negative", "nan"],
)
def test_impossible_counts_are_refused(first_bin: int, counts: Tensor) -> None:
    with pytest.raises(ValueError):
        Histogram.from_counts("float32", first_bin, counts.double())


def test_empty_histogram_has_no_quantile_and_says_what_to_do() -> None:
    for question in (Histogram().quantile, Histogram().cdf):
        with pytest.raises(UserError, match="Calibrate with a text"):
            question(0.5)


def test_merging_different_dtypes_is_refused() -> None:
    with pytest.raises(UserError, match=r"bfloat16 .* float16"):
        Histogram("bfloat16").merge(Histogram("float16"))


def test_dtype_without_bins_is_refused_with_those_that_have() -> None:
    with pytest.raises(UserError, match=r"'float64'.*bfloat16, float16, float32"):
        Histogram("float64")
