import numpy as np
import pytest

pytest.importorskip("numba")

from teal.kernels.cpu.quantized_inner import add_byte_rows, add_nibble_rows
from teal.kernels.cpu.simd import FP8_FACTOR, NIBBLE_BASE

CHANNELS, STRIDE, FIRST, WIDTH = 40, 30, 3, 21
# Entries from `begin` to `end`: less than a group of eight, a group, and groups and a rest.
spans = pytest.mark.parametrize("begin, end", [(0, 3), (2, 10), (1, 20), (5, 5)])


def _entries(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 25 kept channels and their activations, whole numbers so that sums are exact."""
    generator = np.random.default_rng(0)
    channels = np.sort(generator.choice(CHANNELS, 25, replace=False)).astype(np.int64)
    return channels, generator.integers(-9, 9, (25, rows)).astype(np.float32)


def _codes() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, CHANNELS * STRIDE).astype(np.uint8)


def _added(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return 1 + values.T.astype(np.float64) @ rows


@spans
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_int8_codes_are_added_times_their_activations(
    begin: int, end: int, rows: int
) -> None:
    channels, values = _entries(rows)
    codes = _codes().view(np.int8)
    sums = np.ones((rows, WIDTH), np.float32)
    add_byte_rows(sums, codes, STRIDE, FIRST, channels, values, begin, end)
    added = codes.reshape(CHANNELS, STRIDE)[channels[begin:end], FIRST : FIRST + WIDTH]
    assert (sums == _added(values[begin:end], added)).all()


@spans
def test_rows_of_fp8_codes_are_added_as_a_256th_of_their_values(begin: int, end: int) -> None:
    channels, values = _entries(1)
    # 1, 1.5, -2 and the smallest subnormal number of fp8 e4m3.
    table = {0x38: 1.0, 0x3C: 1.5, 0xC0: -2.0, 0x01: 2.0**-9}
    codes = np.array(list(table), np.uint8)[_codes() % 4]
    sums = np.ones((1, WIDTH), np.float32)
    add_byte_rows(sums, codes, STRIDE, FIRST, channels, values, begin, end)
    numbers = np.vectorize(table.get)(codes.reshape(CHANNELS, STRIDE)) / FP8_FACTOR
    added = numbers[channels[begin:end], FIRST : FIRST + WIDTH]
    np.testing.assert_allclose(sums, _added(values[begin:end], added), rtol=1e-6)


@spans
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_nibbles_are_added_less_their_zeros(begin: int, end: int, rows: int) -> None:
    channels, values = _entries(rows)
    codes = _codes()
    zero = np.arange(WIDTH) % 16
    zeros = np.float32(NIBBLE_BASE) + np.stack([zero, 16 * zero]).astype(np.float32)
    sums = np.ones((2, rows, WIDTH), np.float32)
    add_nibble_rows(sums, codes, STRIDE, FIRST, channels, values, begin, end, zeros)
    added = codes.reshape(CHANNELS, STRIDE)[channels[begin:end], FIRST : FIRST + WIDTH].astype(int)
    low, high = (added & 15) - zero, 16 * ((added >> 4) - zero)
    assert (sums[0] == _added(values[begin:end], low)).all()
    assert (sums[1] == _added(values[begin:end], high)).all()
