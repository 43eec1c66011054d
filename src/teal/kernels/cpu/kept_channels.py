"""Which channels the products on a CPU keep, as lists that their kernels read.

Legend: `T` rows, `K` in_features.
"""

import numpy as np

from teal.kernels.cpu.numerics import Array, array, narrow, norm_into, widen
from teal.kernels.cpu.threads import compiled

# Channels (lists, K), their activations (lists, K, T) and how many of each list are kept.
Lists = tuple[Array, Array, Array]


@compiled()
def make_lists(
    element: np.generic,
    inputs: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    count: int,
    thresholds: tuple[float, float, float],
    eps: float,
) -> Lists:
    """Return channels (lists, K), their activations (lists, K, T) and how many are kept."""
    rows, in_features, _ = sizes
    x = array(element, inputs[0], rows * in_features).reshape(rows, in_features)
    if inputs[1] != 0:
        x = _normed(x, array(element, inputs[1], in_features), np.float32(eps))
    channels = np.empty((count, in_features), np.int64)
    values = np.empty((count, in_features, rows), np.float32)
    kept = np.empty(count, np.int64)
    for i in range(count):
        score_scale = inputs[2] if inputs[2] == 0 else inputs[2] + 4 * i * in_features
        kept[i] = list_kept(
            x, score_scale, inputs[3], np.float32(thresholds[i]), channels[i], values[i]
        )
    return channels, values, kept


@compiled()
def _normed(x: Array, norm_weight: Array, eps: np.float32) -> Array:
    result = np.empty_like(x)
    for row in range(len(x)):
        norm_into(result[row], x[row], norm_weight, eps)
    return result


@compiled()
def list_kept(
    x: Array, scale_address: int, shift_address: int, threshold: np.float32, *lists: Array
) -> int:
    """List the channels that any row keeps, with 0 for the rows that drop them.

    Args:
        x: Activations, (T, K).
        scale_address: Where score_scale (K,) begins, float32; 0 for none.
        shift_address: Where shift (K,) begins, float32; 0 for none.
        threshold: Cut-off in score units.
        *lists: Room for channels (K,) int64, and for their activations (K, T) float32.

    Returns:
        How many channels are kept; the lists mean nothing from there on.
    """
    channels, values = lists
    rows, in_features = x.shape
    score_scale = array(np.float32(0), scale_address, in_features * (scale_address != 0))
    shift = array(np.float32(0), shift_address, in_features * (shift_address != 0))
    kept = 0
    # Entries are written before it is decided whether they stay: there is no branch to mispredict.
    if rows == 1:
        for channel in range(in_features):
            value, score = _score(x[0, channel], channel, score_scale, shift)
            channels[kept] = channel
            values[kept, 0] = value
            kept += not (score <= threshold)
        return kept
    for channel in range(in_features):
        channels[kept] = channel
        keep_any = False
        for row in range(rows):
            value, score = _score(x[row, channel], channel, score_scale, shift)
            keep = not (score <= threshold)
            values[kept, row] = value if keep else np.float32(0)
            keep_any |= keep
        kept += keep_any
    return kept


@compiled()
def _score(
    bits: np.generic, channel: int, score_scale: Array, shift: Array
) -> tuple[np.float32, np.float32]:
    """Return an activation less its shift, and its score. Compared as not ≤, NaN is kept."""
    value = widen(bits)
    score = value
    if len(shift) > 0:
        score = value - shift[channel]
        value = widen(narrow(bits, score))
    score = abs(score)
    if len(score_scale) > 0:
        score = score * score_scale[channel]
    return value, score
