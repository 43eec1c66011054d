"""Checks that the operands of an operation fit together, in sentences with a cure."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.foundation.errors import UserError, unknown_name
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference
from teal.kernels.reference.quantized import FP8, INT4, INT8

_CODES = (FP8, INT4, INT8)


def check_product(operands: Operands) -> None:
    """Check the operands of a product.

    Raises:
        UserError: Shapes, dtypes, devices or numbers of parts do not fit together.
    """
    x, weight = operands.x, operands.weight
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a channel-major weight (in_features, out_features)."
        )
    _check_alike("weight", weight, x)
    _check_beside(operands, weight.shape)


def check_quantized(operands: Operands, quant: QuantParams) -> None:
    """Check the operands of a product with a quantized weight.

    Raises:
        UserError: Shapes, dtypes, devices or numbers of parts do not fit together.
    """
    x, codes = operands.x, operands.weight
    scales, zeros, group_size = quant
    if codes.dtype not in _CODES or codes.ndim != 2 or scales.ndim != 2 or group_size < 1:
        raise UserError(
            f"codes are {codes.dtype} {tuple(codes.shape)}, scales {tuple(scales.shape)}, in "
            f"groups of {group_size}. Give a channel-major weight of int8, float8_e4m3fn, or "
            "int4 packed in uint8, and scales (groups, out_features)."
        )
    in_features, out_features = len(codes), scales.shape[1]
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise UserError(
            f"x has shape {tuple(x.shape)} and codes {tuple(codes.shape)}. "
            "Give x (..., in_features) and channel-major codes."
        )
    grid_shape = (-(-in_features // group_size), out_features)
    columns = -(-out_features // 2) if codes.dtype == INT4 else out_features
    _check_shape("codes", codes, (in_features, columns))
    _check_shape("scales", scales, grid_shape)
    _check_shape("zeros", zeros, grid_shape)
    if zeros is not None and not zeros.dtype == codes.dtype == INT4:
        raise UserError(f"zeros are {zeros.dtype}. Give uint8, and only with int4 codes.")
    for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.device != x.device:
            raise UserError(
                f"x is on {x.device}, {name} on {tensor.device}. Bring them to one device."
            )
    _check_beside(operands, (in_features, out_features))


def _check_beside(operands: Operands, shape: Sequence[int]) -> None:
    """Check the operands that go with a weight of `shape`, (in_features, out_features)."""
    x, (in_features, out_features) = operands.x, shape
    _check_parts(operands, shape)
    # Most vectors are absent, and a call costs more than asking for them here.
    if operands.shift is not None:
        _check_shape("shift", operands.shift, (in_features,))
    if operands.norm_weight is not None:
        _check_shape("norm_weight", operands.norm_weight, (in_features,))
    if operands.bias is not None:
        _check_shape("bias", operands.bias, (out_features,))
        _check_alike("bias", operands.bias, x)
    if operands.residual is not None:
        _check_shape("residual", operands.residual, (*x.shape[:-1], out_features))
        _check_alike("residual", operands.residual, x)


def _check_parts(operands: Operands, shape: Sequence[int]) -> None:
    thresholds, output_sizes = operands.thresholds, operands.output_sizes
    score_scale, parts = operands.score_scale, len(output_sizes)
    scales = parts if score_scale is None else len(score_scale)
    if not parts or not len(thresholds) == parts == scales:
        raise UserError(
            f"{parts} output_sizes, {len(thresholds)} thresholds, scales for {scales} parts. "
            "Give one of each per part."
        )
    in_features, out_features = shape
    if score_scale is not None and score_scale.shape[1:] != (in_features,):
        _check_shape("score_scale", score_scale[0], (in_features,))
    if sum(output_sizes) != out_features or (min(output_sizes) < 1 and out_features > 0):
        raise UserError(
            f"output_sizes {list(output_sizes)} do not sum to the {out_features} columns of the "
            "weight. Give the columns of every part."
        )


def check_lm_head(x: Tensor, weight: Tensor) -> None:
    """Check the operands of `ops.lm_head_gemv`.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise UserError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}. "
            "Give x (..., in_features) and a weight (out_features, in_features)."
        )
    _check_alike("weight", weight, x)


def glu_output_sizes(shape: Sequence[int], activation: str) -> list[int]:
    """Return the columns of gate and of up.

    Args:
        shape: Shape of gate and up beside each other, (in_features, 2 · intermediate_size).
        activation: Name in `reference.GATES`.

    Raises:
        UserError: There are no two halves, or the activation is unknown.
    """
    if activation not in reference.GATES:
        raise unknown_name("activation", activation, reference.GATES)
    if len(shape) != 2 or shape[1] % 2:
        raise UserError(
            f"The weight has shape {tuple(shape)}. "
            "Give gate and up beside each other, (in_features, 2 · intermediate_size)."
        )
    return [shape[1] // 2] * 2


def check_attend(
    qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor
) -> None:
    """Check the operands of `reference.attention.attend`, which explains them.

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
