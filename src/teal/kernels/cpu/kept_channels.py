"""Compaction on the CPU: the channels that a product keeps, and their activations.

Legend: `T` rows, `K` in_features.
"""

import numpy as np

from teal.kernels.cpu.compile_cache import compiled
from teal.kernels.cpu.numerics import Array, array, narrow, norm_into, widen

# For each mask: its kept channels (masks, K), their activations (masks, K, T), and how many of them
# there are (masks,); entries from there on mean nothing.
KeptChannels = tuple[Array, Array, Array]


@compiled()
def compact_inputs(
    element: np.generic,
    inputs: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    masks: int,
    thresholds: tuple[float, float, float],
    eps: float,
) -> KeptChannels:
    """Normalize the activations if there is a norm, and compact them once for each mask.

    Args:
        element: Zero of the type of the activations; see `gemv_kernel.product`.
        inputs: Addresses of x, norm weight, score_scale and shift; see `gemv_kernel.product`.
        sizes: T, K, N.
        masks: Number of masks.
        thresholds: Cut-off of each mask in score units, rounded to float32.
        eps: Added to the mean square in the norm.
    """
    rows, in_features, _ = sizes
    x = array(element, inputs[0], rows * in_features).reshape(rows, in_features)
    if inputs[1] != 0:
        x = _normed(x, array(element, inputs[1], in_features), np.float32(eps))
    channels = np.empty((masks, in_features), np.int64)
    values = np.empty((masks, in_features, rows), np.float32)
    kept = np.empty(masks, np.int64)
    for i in range(masks):
        score_scale = inputs[2] if inputs[2] == 0 else inputs[2] + 4 * i * in_features
        kept[i] = compact(
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
def compact(
    x: Array, scale_address: int, shift_address: int, threshold: np.float32, *kept_channels: Array
) -> int:
    """Write the channels that any row keeps, and their activations: 0 for rows that drop them.

    Args:
        x: Activations, (T, K).
        scale_address: Address of score_scale (K,), float32; 0 for none.
        shift_address: Address of shift (K,), float32; 0 for none.
        threshold: Cut-off in score units.
        *kept_channels: Room for the channels (K,), int64, and their activations (K, T), float32.

    Returns:
        How many channels are kept; entries from there on mean nothing.
    """
    channels, values = kept_channels
    rows, in_features = x.shape
    score_scale = array(np.float32(0), scale_address, in_features * (scale_address != 0))
    shift = array(np.float32(0), shift_address, in_features * (shift_address != 0))
    kept = 0
    # An entry is written before it is known whether it is kept: there is no branch to mispredict.
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
    """Return an activation minus its shift, and its score, in float32."""
    value = widen(bits)
    score = value
    if len(shift) > 0:
        score = value - shift[channel]
        value = widen(narrow(bits, score))
    score = abs(score)
    if len(score_scale) > 0:
        score = score * score_scale[channel]
    return value, score
