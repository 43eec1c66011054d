"""CPU kernel of decode attention: norms per head, RoPE, append to the cache and attention."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.numerics import (
    ELEMENTS,
    Array,
    array,
    exponential,
    narrow,
    norm_into,
    prefetch,
    widen,
)
from teal.kernels.cpu.simd import LINE_BYTES
from teal.kernels.cpu.threads import available_threads, run_threaded

# The hardware prefetches nothing beyond a page of memory, which holds 16 keys of head_dim 128.
_TOKENS_AHEAD = 16
# Tokens per task. Tasks are added up in order, so the number of threads does not change the bits.
CHUNK = 256
# Below this many entries of keys, waking a thread costs more than it saves.
_ENTRIES_PER_CALL = 1 << 16
# For each task and query head: the weighted sum of values (tasks, group, head_dim), the largest
# score and the sum of weights (tasks, group).
Partials = tuple[Array, Array, Array]

_LOWEST = np.float32(-3e38)
_NONE = np.float32(-np.inf)


class NumbaAttention:
    """Decode attention on the CPU by a kernel that numba compiles."""

    name = "numba"

    def can_run(self, qkv: Tensor, *_: Tensor) -> str | None:
        """Return why attention cannot be computed, or `None` if it can; see `NumbaBackend`."""
        return None if qkv.dtype in ELEMENTS else "qkv is not float32, bfloat16 or float16"

    def run(self, *tensors: Tensor, **options: Any) -> Tensor:
        """Append and attend; see `attend`."""
        return attend(*tensors, **options)


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Append one token per sequence to its cache, in place, and attend from it to the cache.

    Same meaning as `reference.attention.attend`, which explains the arguments. It reads only the
    part of the cache that attention covers. The result does not depend on the number of threads.

    Raises:
        UserError: A position is not inside the cache.
    """
    rows, kv_heads, capacity, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    dtype = qkv.dtype
    q_norm_weight, k_norm_weight = (
        _norm_weight(q_norm_weight, dtype),
        _norm_weight(k_norm_weight, dtype),
    )
    result = torch.empty((rows, heads * head_dim), dtype=dtype)
    threads = available_threads()
    fits = run_threaded(
        threads,
        attention,
        ELEMENTS[dtype],
        (qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), result.data_ptr()),
        (positions.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
        (_address(q_norm_weight), _address(k_norm_weight)),
        (rows, heads, kv_heads, capacity, head_dim, cosines.shape[1]),
        (scale, softcap, eps),
        window,
        threads,
    )
    if not fits:
        raise UserError(
            f"Positions {positions.tolist()} are not all inside a cache of {capacity} tokens. "
            "Make a larger cache or stop earlier."
        )
    return result


def _norm_weight(norm_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if norm_weight is None else norm_weight.to(dtype).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@compiled(parallel=True)
def attention(
    element: np.generic,
    tensors: tuple[int, int, int, int],
    tables: tuple[int, int, int],
    norm_weights: tuple[int, int],
    sizes: tuple[int, int, int, int, int, int],
    factors: tuple[float, float, float],
    window: int,
    threads: int,
) -> bool:
    """Append and attend, all sums in float32.

    Args:
        element: Zero of the type that stands for the dtype of the tensors; see
            `gemv_kernel.product`.
        tensors: Addresses of qkv, keys, values and the result.
        tables: Addresses of positions, cosines and sines.
        norm_weights: Addresses of the weights of the norms of queries and keys, 0 for none.
        sizes: Rows, query heads, key heads, capacity, head_dim, and half of the rotated entries.
        factors: Scale, soft cap and eps.
        window: How many tokens attention covers at most; 0 for all.
        threads: How many of numba's threads share the tasks.

    Returns:
        Whether all positions are inside the cache. If not, nothing is written.
    """
    places = _place(array(np.int64(0), tables[0], sizes[0]), sizes, window)
    if len(places) == 0:
        return sizes[0] == 0
    queries, keys, values = _append(element, tensors, tables, norm_weights, sizes, factors[2])
    partials = _partials(queries, keys, places)
    shares = 1 if len(places) * CHUNK * keys.shape[3] < _ENTRIES_PER_CALL else threads
    # A small body and one type of index, as in gemv_kernel.
    if shares == 1:
        for thread in range(shares):
            _attend_share(queries, keys, values, places, partials, factors, thread, shares)
    else:
        for thread in numba.prange(shares):
            index: int = np.int64(thread)  # type: ignore[assignment]
            _attend_share(queries, keys, values, places, partials, factors, index, shares)
    _combine(array(element, tensors[3], queries.size).reshape(queries.shape), places, partials)
    return True


@compiled()
def _place(positions: Array, sizes: tuple[int, int, int, int, int, int], window: int) -> Array:
    """Return row, key head, first token and end of every task, (tasks, 4).

    There are no tasks if a position is outside the cache.
    """
    rows, _, kv_heads, capacity, _, _ = sizes
    tasks = 0
    for row in range(rows):
        if positions[row] < 0 or positions[row] >= capacity:
            return np.empty((0, 4), np.int64)
        covered = positions[row] + 1 if window == 0 else min(positions[row] + 1, window)
        tasks += (covered + CHUNK - 1) // CHUNK * kv_heads
    places = np.empty((tasks, 4), np.int64)
    task = 0
    for row in range(rows):
        end = positions[row] + 1
        begin = 0 if window == 0 else max(0, end - window)
        for kv in range(kv_heads):
            for first in range(begin, end, CHUNK):
                places[task, 0], places[task, 1] = row, kv
                places[task, 2], places[task, 3] = first, min(end, first + CHUNK)
                task += 1
    return places


@compiled()
def _append(
    element: np.generic,
    tensors: tuple[int, int, int, int],
    tables: tuple[int, int, int],
    norm_weights: tuple[int, int],
    sizes: tuple[int, int, int, int, int, int],
    eps: float,
) -> tuple[Array, Array, Array]:
    """Write the new keys and values; return queries, (T, heads, head_dim), and the caches."""
    rows, heads, kv_heads, capacity, head_dim, half = sizes
    positions = array(np.int64(0), tables[0], rows)
    cosines = array(np.float32(0), tables[1], capacity * half).reshape(capacity, half)
    sines = array(np.float32(0), tables[2], capacity * half).reshape(capacity, half)
    shape = (rows, heads + 2 * kv_heads, head_dim)
    qkv = array(element, tensors[0], shape[0] * shape[1] * shape[2]).reshape(shape)
    cache = rows * kv_heads * capacity * head_dim
    keys = array(element, tensors[1], cache).reshape(rows, kv_heads, capacity, head_dim)
    values = array(element, tensors[2], cache).reshape(rows, kv_heads, capacity, head_dim)
    queries = np.empty((rows, heads, head_dim), np.float32)
    rotated = np.empty_like(qkv[0, 0])
    for row in range(rows):
        position = positions[row]
        cosine, sine = cosines[position], sines[position]
        for head in range(heads):
            _rotate(rotated, qkv[row, head], norm_weights[0], np.float32(eps), cosine, sine)
            for c in range(head_dim):
                queries[row, head, c] = widen(rotated[c])
        for kv in range(kv_heads):
            key, value = qkv[row, heads + kv], qkv[row, heads + kv_heads + kv]
            _rotate(keys[row, kv, position], key, norm_weights[1], np.float32(eps), cosine, sine)
            for c in range(head_dim):
                values[row, kv, position, c] = value[c]
    return queries, keys, values


@compiled(fuse=True)
def _rotate(
    result: Array, head: Array, norm_weight: int, eps: np.float32, cosine: Array, sine: Array
) -> None:
    """Apply the norm, if there is one, and RoPE to one head."""
    source = head
    if norm_weight != 0:
        norm_into(result, head, array(head[0], norm_weight, len(head)), eps)
        source = result
    half = len(cosine)
    for i in range(half):
        low, high = widen(source[i]), widen(source[half + i])
        result[i] = narrow(head[0], low * cosine[i] - high * sine[i])
        result[half + i] = narrow(head[0], high * cosine[i] + low * sine[i])
    for i in range(2 * half, len(head)):
        result[i] = source[i]


@compiled()
def _partials(queries: Array, keys: Array, places: Array) -> Partials:
    """Allocate the results of the tasks."""
    tasks, group = len(places), queries.shape[1] // keys.shape[1]
    sums = np.empty((tasks, group, keys.shape[3]), np.float32)
    return sums, np.empty((tasks, group), np.float32), np.empty((tasks, group), np.float32)


@compiled()
def _attend_share(
    queries: Array,
    keys: Array,
    values: Array,
    places: Array,
    partials: Partials,
    factors: tuple[float, float, float],
    thread: int,
    threads: int,
) -> None:
    """Compute the tasks of one thread."""
    scale, softcap, _ = factors
    sums, tops, totals = partials
    tasks, group, _ = sums.shape
    weights = np.empty((group, CHUNK), np.float32)
    for task in range(tasks * thread // threads, tasks * (thread + 1) // threads):
        row, kv, begin, end = places[task]
        shared = queries[row, kv * group : (kv + 1) * group]
        scores = weights[:, : end - begin]
        past_keys, past_values = keys[row, kv, begin:end], values[row, kv, begin:end]
        _score(scores, shared, past_keys, past_values, np.float32(scale))
        if softcap > 0:
            _cap(scores, np.float32(softcap))
        for g in range(group):
            tops[task, g], totals[task, g] = _exponentiate(scores[g])
        sums[task, :, :] = 0
        _add_values(sums[task], scores, past_values)


@compiled(reorder=True)
def _score(scores: Array, queries: Array, keys: Array, values: Array, scale: np.float32) -> None:
    """Write `scale · q · k` for all queries and keys, prefetching the values meanwhile."""
    tokens, width = keys.shape
    line = LINE_BYTES // keys.itemsize
    # The last key is repeated up to a multiple of four: one loop for every number of tokens.
    last = tokens - 1
    for token in range(0, tokens, 4):
        second, third, fourth = min(token + 1, last), min(token + 2, last), min(token + 3, last)
        k0, k1, k2, k3 = keys[token], keys[second], keys[third], keys[fourth]
        for entry in range(token * width, (token + 4) * width, line):
            prefetch(keys, entry + _TOKENS_AHEAD * width)
            prefetch(values, entry)
        for g in range(len(queries)):
            query = queries[g]
            s0 = s1 = s2 = s3 = np.float32(0)
            for c in range(width):
                s0 += query[c] * widen(k0[c])
                s1 += query[c] * widen(k1[c])
                s2 += query[c] * widen(k2[c])
                s3 += query[c] * widen(k3[c])
            scores[g, token], scores[g, second] = s0 * scale, s1 * scale
            scores[g, third], scores[g, fourth] = s2 * scale, s3 * scale


@compiled()
def _cap(scores: Array, softcap: np.float32) -> None:
    for g in range(len(scores)):
        for token in range(scores.shape[1]):
            scores[g, token] = softcap * np.tanh(scores[g, token] / softcap)


@compiled(reorder=True)
def _exponentiate(scores: Array) -> tuple[np.float32, np.float32]:
    """Replace scores by softmax weights before division; return the largest score and their sum."""
    top = _NONE
    for token in range(len(scores)):
        top = scores[token] if scores[token] > top else top
    # -inf minus -inf would be NaN.
    top = max(top, _LOWEST)
    total = np.float32(0)
    for token in range(len(scores)):
        weight = exponential(scores[token] - top)
        scores[token] = weight
        total += weight
    return top, total


@compiled(fuse=True)
def _add_values(sums: Array, weights: Array, values: Array) -> None:
    """Add `Σ weights[g, token] · values[token]` to `sums`, (group, head_dim)."""
    tokens = len(values)
    grouped = tokens // 4 * 4
    for token in range(0, grouped, 4):
        v0, v1, v2, v3 = values[token], values[token + 1], values[token + 2], values[token + 3]
        for g in range(len(sums)):
            total = sums[g]
            w0, w1 = weights[g, token], weights[g, token + 1]
            w2, w3 = weights[g, token + 2], weights[g, token + 3]
            for c in range(len(total)):
                total[c] += (
                    w0 * widen(v0[c]) + w1 * widen(v1[c]) + w2 * widen(v2[c]) + w3 * widen(v3[c])
                )
    for token in range(grouped, tokens):
        value = values[token]
        for g in range(len(sums)):
            total, weight = sums[g], weights[g, token]
            for c in range(len(total)):
                total[c] += weight * widen(value[c])


@compiled()
def _combine(result: Array, places: Array, partials: Partials) -> None:
    """Add up the tasks of every head in order, rescaled to the largest score, and divide."""
    sums, tops, totals = partials
    _, group, head_dim = sums.shape
    begin = 0
    while begin < len(places):
        row, kv = places[begin, 0], places[begin, 1]
        end = begin + 1
        while end < len(places) and places[end, 0] == row and places[end, 1] == kv:
            end += 1
        for g in range(group):
            top = tops[begin, g]
            for task in range(begin + 1, end):
                top = max(top, tops[task, g])
            total = np.float32(0)
            for task in range(begin, end):
                factor = exponential(tops[task, g] - top)
                total += factor * totals[task, g]
                for c in range(head_dim):
                    sums[task, g, c] *= factor
            for task in range(begin + 1, end):
                for c in range(head_dim):
                    sums[begin, g, c] += sums[task, g, c]
            target = result[row, kv * group + g]
            for c in range(head_dim):
                target[c] = narrow(target[c], sums[begin, g, c] / total)
        begin = end
