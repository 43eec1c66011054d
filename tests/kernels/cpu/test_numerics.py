import math

import numpy as np
import pytest

pytest.importorskip("numba")

from teal.kernels.cpu.numerics import exponential


def test_exponential_errs_by_two_units_in_the_last_place_at_most() -> None:
    for x in np.linspace(-86.9, 87.9, 5001).astype(np.float32):
        assert exponential(x) == pytest.approx(math.exp(x), rel=2 * 2.0**-23)


@pytest.mark.parametrize(
    "x, expected", [(0, 1), (-88, 0), (-math.inf, 0), (89, math.inf), (math.inf, math.inf)]
)
def test_exponential_is_zero_below_its_range_and_inf_above(x: float, expected: float) -> None:
    assert exponential(np.float32(x)) == expected


def test_exponential_of_nan_is_nan() -> None:
    assert math.isnan(exponential(np.float32(math.nan)))
