"""CPU kernel that dequantizes a weight, for more rows than the quantized kernel takes."""

import numba
import numpy as np
import torch
from torch import Tensor

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.numerics import ELEMENTS, Array, array, narrow, widen
from teal.kernels.cpu.quantized_kernel import INT4_CODES, INT8_CODES, Weight, read_zeros
from teal.kernels.cpu.simd import (
    FP8_FACTOR,
    HIGH_FACTOR,
    NIBBLE_BASE,
    code_value,
    high_nibble,
    low_nibble,
)
from teal.kernels.cpu.threads import run_threaded, thread_count

_ONE = np.float32(1)
_FP8_FACTOR, _HIGH_FACTOR = np.float32(FP8_FACTOR), np.float32(HIGH_FACTOR)
_MIDDLE_LOW, _MIDDLE_HIGH = np.float32(NIBBLE_BASE + 8), np.float32(NIBBLE_BASE + 128)


def dequantized(weight: Weight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return `(code - zero) · scale`, as `reference.quantized.dequantized` does.

    Args:
        weight: The quantized weight, in the form that kernels take.
        shape: in_features and out_features.
        dtype: dtype of the result, one of `ELEMENTS`; computed in float32 and rounded once.

    Returns:
        (in_features, out_features), in `dtype`.
    """
    result = torch.empty(shape, dtype=dtype)
    threads = thread_count(*shape)
    run_threaded(threads, write_floats, ELEMENTS[dtype], weight, result.data_ptr(), shape, threads)
    return result


@compiled(parallel=True)
def write_floats(
    element: np.generic, weight: Weight, result: int, shape: tuple[int, int], threads: int
) -> None:
    """Write `(code - zero) · scale`.

    Args:
        element: Zero of the type that stands for the dtype of the result; see
            `gemv_kernel.product`.
        weight: The quantized weight (K, N).
        result: Address of the result (K, N).
        shape: K, N.
        threads: How many of numba's threads divide the channels among them.
    """
    # A small body and one type of index, as in gemv_kernel.
    if threads == 1:
        for thread in range(threads):
            _write_share(element, weight, result, shape, thread, threads)
    else:
        for thread in numba.prange(threads):
            index: int = np.int64(thread)  # type: ignore[assignment]
            _write_share(element, weight, result, shape, index, threads)


@compiled()
def _write_share(
    element: np.generic,
    weight: Weight,
    result: int,
    shape: tuple[int, int],
    thread: int,
    threads: int,
) -> None:
    in_features, out_features = shape
    groups = (in_features + weight[5] - 1) // max(1, weight[5])
    floats = array(element, result, in_features * out_features).reshape(in_features, out_features)
    scales = array(weight[6], weight[1], groups * out_features).reshape(groups, out_features)
    signed = array(np.int8(0), weight[0], in_features * weight[3])
    octets = array(np.uint8(0), weight[0], in_features * weight[3])
    zeros = np.empty((2, weight[3]), np.float32)
    zeros[0], zeros[1] = _MIDDLE_LOW, _MIDDLE_HIGH
    last = -1
    for channel in range(in_features * thread // threads, in_features * (thread + 1) // threads):
        group, start = channel // weight[5], channel * weight[3]
        if weight[4] == INT8_CODES:
            _write_bytes(floats[channel], signed[start : start + weight[3]], scales[group], _ONE)
        elif weight[4] == INT4_CODES:
            if weight[2] != 0 and group != last:
                own = array(np.uint8(0), weight[2] + group * out_features, out_features)
                read_zeros(zeros, own, 0)
                last = group
            _write_nibbles(floats[channel], octets[start : start + weight[3]], scales[group], zeros)
        else:
            codes = octets[start : start + weight[3]]
            _write_bytes(floats[channel], codes, scales[group], _FP8_FACTOR)


@compiled()
def _write_bytes(floats: Array, codes: Array, scales: Array, factor: np.float32) -> None:
    for c in range(len(floats)):
        floats[c] = narrow(floats[c], code_value(codes[c]) * factor * widen(scales[c]))


@compiled()
def _write_nibbles(floats: Array, codes: Array, scales: Array, zeros: Array) -> None:
    low, high = zeros[0], zeros[1]
    for b in range(len(floats) // 2):
        left, right = low_nibble(codes[b]) - low[b], high_nibble(codes[b]) - high[b]
        floats[2 * b] = narrow(floats[0], left * widen(scales[2 * b]))
        floats[2 * b + 1] = narrow(floats[0], right * _HIGH_FACTOR * widen(scales[2 * b + 1]))
    if len(floats) % 2:
        last, b = len(floats) - 1, len(codes) - 1
        left = low_nibble(codes[b]) - low[b]
        floats[last] = narrow(floats[0], left * widen(scales[last]))
