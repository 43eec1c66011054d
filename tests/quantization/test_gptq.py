import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.quantization import Scheme, SecondMoments, quantize_by_moments, round_to_nearest
from tests.helpers import relative_error

SCHEMES = {
    "int4": Scheme(format="int4", group_size=32),
    "int4-asymmetric": Scheme(format="int4", group_size=32, symmetric=False),
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
}

every_scheme = pytest.mark.parametrize("name", SCHEMES)

IN, OUT = 160, 24


def correlated(rows: int = 600, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN // 4, IN, generator=torch.Generator().manual_seed(2))
    few = torch.randn(rows, IN // 4, generator=generator) @ mixing
    return few + 0.3 * torch.randn(rows, IN, generator=generator)


def moments_of(x: Tensor) -> SecondMoments:
    moments = SecondMoments(x.shape[-1], "cpu")
    for part in x.split(100):
        moments.add(part)
    return moments


def dense() -> Tensor:
    return torch.randn(IN, OUT, generator=torch.Generator().manual_seed(0)) * IN**-0.5


@every_scheme
def test_error_with_correlated_activations_is_well_below_that_of_rounding(name: str) -> None:
    weight, held_out = dense(), correlated(seed=9)
    exact = held_out @ weight
    by_gptq = quantize_by_moments(weight, moments_of(correlated()), SCHEMES[name])
    nearest = round_to_nearest(weight, SCHEMES[name])
    error = relative_error(held_out @ by_gptq.dequantize(), exact)
    assert error < 0.7 * relative_error(held_out @ nearest.dequantize(), exact)


@every_scheme
def test_uncorrelated_activations_give_the_codes_of_rounding(name: str) -> None:
    moments = SecondMoments(IN, "cpu")
    moments.total += torch.eye(IN)
    by_gptq = quantize_by_moments(dense(), moments, SCHEMES[name])
    assert torch.equal(by_gptq.dequantize(), round_to_nearest(dense(), SCHEMES[name]).dequantize())


def test_last_channel_minimizes_the_remaining_error() -> None:
    weight = dense()
    moments = moments_of(correlated())
    quantized = quantize_by_moments(weight, moments, SCHEMES["int8"]).dequantize().double()
    total = moments.total.double()
    damped = total + 0.01 * total.diagonal().mean() * torch.eye(IN)
    # With all channels but the last rounded, the best last channel solves a least-squares problem;
    # GPTQ rounds that one, so it ends within half a step of it.
    change = quantized - weight.double()
    best = weight[-1].double() - damped[-1, :-1] @ change[:-1] / damped[-1, -1]
    step = weight.abs().amax(0) / 127
    assert ((quantized[-1] - best).abs() <= 0.51 * step).all()


def test_moments_are_the_sum_over_all_rows_of_any_shape() -> None:
    x = correlated(12)
    moments = SecondMoments(IN, "cpu")
    moments.add(x[:8].view(2, 4, IN))
    moments.add(x[8:].bfloat16())
    rows = torch.cat([x[:8], x[8:].bfloat16().float()])
    assert torch.allclose(moments.total, rows.T @ rows, rtol=1e-5, atol=1e-3)


def test_channel_that_is_never_active_becomes_zero() -> None:
    x = correlated()
    x[:, 7] = 0
    weight = quantize_by_moments(dense(), moments_of(x), SCHEMES["int4"]).dequantize()
    assert (weight[7] == 0).all()
    assert torch.isfinite(weight).all()


def test_fewer_rows_than_channels_give_a_finite_weight() -> None:
    weight = quantize_by_moments(dense(), moments_of(correlated(10)), SCHEMES["int4"])
    assert torch.isfinite(weight.dequantize()).all()


def test_weight_without_any_activation_becomes_zero() -> None:
    weight = quantize_by_moments(dense(), SecondMoments(IN, "cpu"), SCHEMES["int8"])
    assert (weight.dequantize() == 0).all()


def test_activations_with_nan_are_refused() -> None:
    moments = moments_of(correlated(5))
    moments.total[0, 0] = torch.nan
    with pytest.raises(UserError, match="Activations hold NaN"):
        quantize_by_moments(dense(), moments, SCHEMES["int8"])


def test_weight_with_inf_is_refused() -> None:
    weight = dense()
    weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="weight holds NaN or infinity"):
        quantize_by_moments(weight, moments_of(correlated(5)), SCHEMES["int8"])
