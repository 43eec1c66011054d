import pytest
import torch
from torch import Tensor

from teal.calibration.histogram import Histogram
from teal.calibration.input_statistics import InputStatistics
from teal.foundation.errors import UserError
from teal.methods import Teal

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")


def statistics_of(x: Tensor, projections: tuple[str, ...] = NAMES) -> InputStatistics:
    dtype = str(x.dtype).removeprefix("torch.")
    statistics = InputStatistics(projections=projections, in_features=x.shape[1], dtype=dtype)
    statistics.add(x)
    return statistics


def activations(rows: int = 200, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(rows, 6) * torch.arange(1, 7) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_those_of_the_activations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal.calibration.input_statistics._CHUNK", 64)
    x = activations(dtype=dtype)
    statistics = statistics_of(x)
    assert statistics.count == 200
    torch.testing.assert_close(statistics.mean, x.double().mean(0))
    torch.testing.assert_close(statistics.second_moment, x.double().square().mean(0))


def test_method_finds_its_threshold_in_the_statistics() -> None:
    x = activations(2000)
    rule = Teal().rule(statistics_of(x), 0.5)
    assert rule is not None
    assert float((x.abs() <= rule.threshold).double().mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("dtype", "cure"),
    [(torch.float16, "Calibrate in bfloat16"), (torch.bfloat16, "Check that the model's weights")],
    ids=["float16", "bfloat16"],
)
def test_nan_and_inf_name_the_projections_and_leave_nothing_behind(
    bad: float, dtype: torch.dtype, cure: str
) -> None:
    x = activations(dtype=dtype)
    statistics = statistics_of(x)
    poisoned = x.clone()
    poisoned[3, 2] = bad
    with pytest.raises(UserError, match=rf"{NAMES[0]}, {NAMES[1]} holds NaN or inf .* {cure}"):
        statistics.add(poisoned)
    assert statistics.count == 200
    assert statistics.histogram.total == x.numel()
    assert statistics.mean.isfinite().all()


def test_largest_float32_is_finite_enough() -> None:
    x = torch.full((4, 2), torch.finfo(torch.float32).max)
    assert statistics_of(x).second_moment.isfinite().all()


def test_no_token_changes_nothing() -> None:
    statistics = statistics_of(activations())
    mean = statistics.mean
    statistics.add(activations(0))
    assert torch.equal(statistics.mean, mean)


def test_merging_two_halves_equals_one_pass() -> None:
    x = activations()
    merged = statistics_of(x[:77]).merge(statistics_of(x[77:]))
    whole = statistics_of(x)
    assert merged.count == whole.count
    assert torch.equal(merged.histogram.counts, whole.histogram.counts)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(merged.second_moment, whole.second_moment, rtol=1e-14, atol=0)


def test_merging_leaves_both_parts_as_they_were() -> None:
    one, other = statistics_of(activations(10)), statistics_of(activations(20))
    one.merge(other).add(activations(30))
    assert (one.count, other.count) == (10, 20)
    assert (one.histogram.total, other.histogram.total) == (60, 120)


def test_merging_different_inputs_is_refused() -> None:
    with pytest.raises(UserError, match="Merge statistics of one model"):
        statistics_of(activations()).merge(statistics_of(activations(), ("another",)))


def test_second_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"bfloat16, not float32.*in one dtype"):
        statistics_of(activations()).add(activations(dtype=torch.bfloat16))


def test_histogram_alone_has_quantiles_but_no_moments() -> None:
    histogram = Histogram()
    histogram.add(activations())
    published = InputStatistics(
        projections=NAMES, in_features=6, dtype="float32", histogram=histogram, count=200
    )
    assert published.quantile(0.5) > 0
    assert published.merge(statistics_of(activations())).moments is None
    with pytest.raises(UserError, match=r"without channel moments\. Calibrate the model"):
        _ = published.mean
