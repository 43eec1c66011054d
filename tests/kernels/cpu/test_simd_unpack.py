import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.numerics import Array
from teal.kernels.cpu.simd import (
    FP8_FACTOR,
    HIGH_FACTOR,
    NIBBLE_BASE,
    code_value,
    high_nibble,
    low_nibble,
)

EVERY = np.arange(256).astype(np.uint8)


@compiled()
def _values(codes: Array) -> Array:
    result = np.empty(len(codes), np.float32)
    for i in range(len(codes)):
        result[i] = code_value(codes[i])
    return result


@compiled()
def _nibbles(codes: Array) -> Array:
    result = np.empty((2, len(codes)), np.float32)
    for i in range(len(codes)):
        result[0, i] = low_nibble(codes[i])
        result[1, i] = high_nibble(codes[i])
    return result


def test_every_int8_code_is_its_number() -> None:
    assert (_values(EVERY.view(np.int8)) == EVERY.view(np.int8)).all()


def test_every_fp8_code_is_a_256th_of_its_number() -> None:
    expected = torch.from_numpy(EVERY).view(torch.float8_e4m3fn).float().numpy()
    numbers = ~np.isnan(expected)
    assert (~numbers).sum() == 2
    assert (_values(EVERY)[numbers] * FP8_FACTOR == expected[numbers]).all()
    assert (np.signbit(_values(EVERY)) == np.signbit(EVERY.view(np.int8))).all()


def test_nan_codes_of_fp8_become_finite() -> None:
    assert _values(np.array([0x7F, 0xFF], np.uint8)).tolist() == [1.875, -1.875]


def test_every_nibble_is_its_number_above_a_base() -> None:
    low, high = _nibbles(EVERY).astype(np.float64) - NIBBLE_BASE
    assert (low == (EVERY & 15)).all()
    assert (high * HIGH_FACTOR == (EVERY >> 4)).all()
