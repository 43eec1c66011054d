"""What the operands of an operation must be, in sentences with a cure."""

import torch
from torch import Tensor

from teal.foundation.errors import UserError, unknown_name
from teal.kernels import reference
from teal.kernels.operands import Operands


def check_product(operands: Operands) -> None:
    """Check the operands of a product.

    Raises:
        UserError: Shapes, dtypes, devices or numbers of parts do not fit together.
    """
    x, weight, _, _, _, shift, bias, residual, gain, _, _ = operands
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a channel-major weight (in_features, out_features)."
        )
    _check_alike("weight", weight, x)
    _check_parts(operands)
    in_features, out_features = weight.shape
    _check_shape("shift", shift, (in_features,))
    _check_shape("gain", gain, (in_features,))
    if bias is not None:
        _check_shape("bias", bias, (out_features,))
        _check_alike("bias", bias, x)
    if residual is not None:
        _check_shape("residual", residual, (*x.shape[:-1], out_features))
        _check_alike("residual", residual, x)


def _check_parts(operands: Operands) -> None:
    thresholds, widths, scale = operands.thresholds, operands.widths, operands.scale
    scales = len(widths) if scale is None else len(scale)
    if not widths or not len(thresholds) == len(widths) == scales:
        raise UserError(
            f"{len(widths)} widths, {len(thresholds)} thresholds and scales for {scales} parts. "
            "Give one of each per part."
        )
    in_features, out_features = operands.weight.shape
    if scale is not None:
        _check_shape("scale", scale[0], (in_features,))
    if sum(widths) != out_features or (min(widths) < 1 and out_features > 0):
        raise UserError(
            f"Widths {list(widths)} do not sum to the {out_features} columns of the weight. "
            "Give the columns of every part."
        )


def check_rows(x: Tensor, weight: Tensor) -> None:
    """Check the operands of a dense product with a weight that lies as rows.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a weight (out_features, in_features)."
        )
    _check_alike("weight", weight, x)


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


def _check_alike(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise UserError(
            f"x is {x.dtype} on {x.device}, {name} {tensor.dtype} on {tensor.device}. "
            "Bring both to one dtype and device."
        )


def _is_plain(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}. Give {shape}.")
