"""What the operands of an operation must be, in sentences with a cure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.foundation.errors import UserError, unknown_name
from teal.kernels import reference


def check_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> None:
    """Check what all products share.

    Args:
        x: Activations, (..., in_features).
        weight: Channel-major weight, (in_features, out_features).
        scale: Score weights, (parts, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).
        gain: Weight of a norm, (in_features,).

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a channel-major weight (in_features, out_features)."
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise UserError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}. "
            "Bring both to one dtype and device."
        )
    in_features, out_features = weight.shape
    _check_shape("scale", None if scale is None else scale[0], (in_features,))
    _check_shape("shift", shift, (in_features,))
    _check_shape("bias", bias, (out_features,))
    _check_shape("gain", gain, (in_features,))


def check_parts(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    widths: Sequence[int],
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Check what products beside each other need, after `check_product`.

    Args:
        x: Activations, (..., in_features).
        weight: (in_features, out_features).
        thresholds: One per part.
        widths: Columns of each part, summing to out_features.
        scale: (parts, in_features).
        residual: (..., out_features).

    Raises:
        UserError: Their numbers or shapes do not fit together.
    """
    scales = len(widths) if scale is None else len(scale)
    if not widths or not len(thresholds) == len(widths) == scales:
        raise UserError(
            f"{len(widths)} widths, {len(thresholds)} thresholds and scales for {scales} parts. "
            "Give one of each per part."
        )
    if min(widths) < 1 or sum(widths) != weight.shape[1]:
        raise UserError(
            f"Widths {list(widths)} do not sum to the {weight.shape[1]} columns of the weight. "
            "Give the columns of every part."
        )
    _check_shape("residual", residual, (*x.shape[:-1], weight.shape[1]))


def gated_widths(weight: Tensor, activation: str) -> list[int]:
    """Return the columns of gate and of up.

    Args:
        weight: Gate and up beside each other, (in_features, 2 · intermediate_size).
        activation: Name in `reference.GATES`.

    Raises:
        UserError: There are no two halves, or the activation is unknown.
    """
    if activation not in reference.GATES:
        raise unknown_name("activation", activation, reference.GATES)
    if weight.ndim != 2 or weight.shape[1] % 2:
        raise UserError(
            f"The weight has shape {tuple(weight.shape)}. "
            "Give gate and up beside each other, (in_features, 2 · intermediate_size)."
        )
    return [weight.shape[1] // 2] * 2


def check_attend(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor
) -> None:
    """Check the operands of `reference_attention.attend`, which explains them.

    Raises:
        UserError: Shapes, dtypes, devices or strides do not fit together.
    """
    if keys.ndim != 4 or keys.shape != values.shape or not _is_plain(keys, values):
        raise UserError(
            f"keys have shape {tuple(keys.shape)} and values {tuple(values.shape)}. "
            "Give both as (rows, kv_heads, capacity, head_dim), contiguous."
        )
    rows, kv_heads, capacity, head_dim = keys.shape
    groups = qkv.shape[-1] // (kv_heads * head_dim) - 2
    if qkv.shape != (rows, (groups + 2) * kv_heads * head_dim) or groups < 1:
        raise UserError(
            f"qkv has shape {tuple(qkv.shape)} for a cache of {rows} rows, {kv_heads} key heads "
            f"and head_dim {head_dim}. Give (rows, (heads + 2 · kv_heads) · head_dim), heads being "
            "a multiple of kv_heads."
        )
    tensors = (qkv, keys, values)
    if len({t.dtype for t in tensors}) > 1 or len({t.device for t in (*tensors, positions)}) > 1:
        raise UserError(
            f"qkv is {qkv.dtype} on {qkv.device}, keys {keys.dtype} on {keys.device}, values "
            f"{values.dtype} on {values.device}, positions on {positions.device}. "
            "Bring them to one dtype and device."
        )
    _check_shape("positions", positions, (rows,))
    if positions.dtype != torch.int64:
        raise UserError(f"positions are {positions.dtype}. Give int64.")
    half = cosines.shape[-1]
    fits = cosines.ndim == 2 and cosines.shape[0] >= capacity and 2 * half <= head_dim
    if not fits or sines.shape != cosines.shape or not _is_plain(cosines, sines):
        raise UserError(
            f"cosines have shape {tuple(cosines.shape)} and sines {tuple(sines.shape)}. Give both "
            f"as (at least {capacity}, at most {head_dim // 2}), contiguous."
        )


def _is_plain(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}. Give {shape}.")
