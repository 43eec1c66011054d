"""Dense CPU product with a weight (out_features, in_features), such as a tied head."""

import math

import numba
import numpy as np
import torch
from torch import Tensor

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.gemv import MAX_ROWS
from teal.kernels.cpu.numerics import ELEMENTS, Array, array, narrow, widen
from teal.kernels.cpu.threads import run_threaded, thread_count

# Rows of the weight read at once: more streams keep more of the memory busy.
_GROUP = 4


class NumbaHead:
    """The product with an output head on the CPU by a kernel that numba compiles."""

    name = "numba"

    def can_run(self, x: Tensor, weight: Tensor) -> str | None:
        """Return why a product cannot be computed, or `None` if it can; see `NumbaBackend`."""
        if x.dtype not in ELEMENTS:
            return "x is not float32, bfloat16 or float16"
        if weight.stride(1) != 1:
            return "the entries of a weight row do not lie side by side"
        if math.prod(x.shape[:-1]) > MAX_ROWS:
            return f"x has more than {MAX_ROWS} rows: torch is faster"
        return None

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute a product; see `lm_head_gemv`."""
        return lm_head_gemv(x, weight)


def lm_head_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`, accumulating in float32.

    The result has the same bits whatever the number of threads.

    Args:
        x: Activations, (..., in_features).
        weight: (out_features, in_features), in the dtype of `x`.

    Returns:
        (..., out_features), in the dtype of `x`.
    """
    out_features, in_features = weight.shape
    x = x.contiguous()
    result = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    threads = thread_count(in_features, out_features)
    run_threaded(
        threads,
        product,
        ELEMENTS[x.dtype],
        (x.data_ptr(), weight.data_ptr(), result.data_ptr()),
        (math.prod(x.shape[:-1]), in_features, out_features, weight.stride(0)),
        threads,
    )
    return result


@compiled(parallel=True)
def product(
    element: np.generic,
    tensors: tuple[int, int, int],
    sizes: tuple[int, int, int, int],
    threads: int,
) -> None:
    """Write `x @ weight.T`.

    Args:
        element: Zero of the type that stands for the dtype of the tensors; see
            `gemv_kernel.product`.
        tensors: Addresses of x (T, K), the weight (N, K) and the result (T, N).
        sizes: T, K, N, and the stride of the weight from row to row in elements.
        threads: How many of numba's threads divide N among them.
    """
    rows, in_features, out_features, stride = sizes
    x = _widened(array(element, tensors[0], rows * in_features)).reshape(rows, in_features)
    weight = array(element, tensors[1], max(0, out_features - 1) * stride + in_features)
    result = array(element, tensors[2], rows * out_features)
    # A small body and one type of index, as in gemv_kernel.
    if threads == 1:
        for thread in range(threads):
            _multiply(x, weight, stride, result, thread, threads)
    else:
        for thread in numba.prange(threads):
            index: int = np.int64(thread)  # type: ignore[assignment]
            _multiply(x, weight, stride, result, index, threads)


@compiled()
def _widened(bits: Array) -> Array:
    result = np.empty(len(bits), np.float32)
    for i in range(len(bits)):
        result[i] = widen(bits[i])
    return result


@compiled(reorder=True)
def _multiply(
    x: Array, weight: Array, stride: int, result: Array, thread: int, threads: int
) -> None:
    """Multiply one thread's share of the weight's rows with every row of x."""
    rows, width = x.shape
    columns = len(result) // max(1, rows)
    share = (columns + _GROUP * threads - 1) // (_GROUP * threads) * _GROUP
    first, last = thread * share, min(columns, (thread + 1) * share)
    grouped = first + max(0, last - first) // _GROUP * _GROUP
    for n in range(first, grouped, _GROUP):
        w0 = weight[n * stride : n * stride + width]
        w1 = weight[(n + 1) * stride : (n + 1) * stride + width]
        w2 = weight[(n + 2) * stride : (n + 2) * stride + width]
        w3 = weight[(n + 3) * stride : (n + 3) * stride + width]
        for row in range(rows):
            values = x[row]
            s0 = s1 = s2 = s3 = np.float32(0)
            for k in range(width):
                s0 += values[k] * widen(w0[k])
                s1 += values[k] * widen(w1[k])
                s2 += values[k] * widen(w2[k])
                s3 += values[k] * widen(w3[k])
            start = row * columns + n
            result[start] = narrow(result[start], s0)
            result[start + 1] = narrow(result[start], s1)
            result[start + 2] = narrow(result[start], s2)
            result[start + 3] = narrow(result[start], s3)
    for n in range(grouped, last):
        w0 = weight[n * stride : n * stride + width]
        for row in range(rows):
            values = x[row]
            s0 = np.float32(0)
            for k in range(width):
                s0 += values[k] * widen(w0[k])
            result[row * columns + n] = narrow(w0[0], s0)
