from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.numerics import ELEMENTS, Array
from teal.kernels.cpu.simd import LINE_BYTES, add_line, prefetch_lines


@compiled(fuse=True)
def _add(
    sums: Array, column: int, weight: Array, starts: tuple[int, ...], factors: tuple[Any, ...]
) -> None:
    add_line(sums, column, weight, starts, factors)


@compiled()
def _prefetch(weight: Array, starts: tuple[int, ...], column: int) -> None:
    prefetch_lines(weight, starts, column)


def _weight(dtype: torch.dtype) -> tuple[Array, torch.Tensor]:
    """Return a weight as kernels see it, and in float64."""
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = weight if dtype == torch.float32 else weight.view(torch.int16)
    return bits.numpy().view(ELEMENTS[dtype].dtype), weight.double()


@pytest.mark.parametrize("dtype", list(ELEMENTS), ids=str)
@pytest.mark.parametrize("starts", [(0, 64, 128), (1, 77, 203)])
def test_a_line_of_sums_is_added_and_nothing_else(
    dtype: torch.dtype, starts: tuple[int, ...]
) -> None:
    weight, exact = _weight(dtype)
    size, column = LINE_BYTES // dtype.itemsize, 3
    factors = np.float32(0.5), np.float32(-3), np.float32(0.1)
    sums = np.arange(50, dtype=np.float32)
    _add(sums, column, weight, starts, factors)
    expected = np.arange(50, dtype=np.float64)
    for start, factor in zip(starts, factors, strict=True):
        begin = start + column
        expected[column : column + size] += float(factor) * exact[begin : begin + size].numpy()
    np.testing.assert_allclose(sums, expected, rtol=1e-6, atol=1e-6)
    outside = np.r_[0:column, column + size : 50]
    assert (sums[outside] == expected[outside]).all()


def test_inf_times_zero_stays_visible_as_nan() -> None:
    weight, _ = _weight(torch.float32)
    weight[5] = np.inf
    sums = np.zeros(16, np.float32)
    _add(sums, 0, weight, (0, 100), (np.float32(0), np.float32(1)))
    assert np.isnan(sums[5]) and np.isfinite(np.delete(sums, 5)).all()


def test_lines_past_the_end_may_be_prefetched() -> None:
    weight, _ = _weight(torch.bfloat16)
    _prefetch(weight, (0, 299, 1 << 40), 64)
