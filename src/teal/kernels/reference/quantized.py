"""The definition of the sparse product on quantized weights, in plain PyTorch."""

import torch
from torch import Tensor

from teal.kernels.reference.matmul import keep_mask

# The dtype of the codes tells the format; int4 is packed, two codes in a byte.
INT4, INT8, FP8 = torch.uint8, torch.int8, torch.float8_e4m3fn

# The zero of int4 codes without zeros of their own.
INT4_MIDDLE = 8


def pack_nibbles(codes: Tensor) -> Tensor:
    """Put two neighbouring columns into each byte, the left one into the lower half.

    Args:
        codes: Numbers from 0 to 15, (in_features, out_features), uint8.

    Returns:
        (in_features, ⌈out_features / 2⌉), uint8; the last upper half of an odd row is zero.
    """
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, out_features: int) -> Tensor:
    """Undo `pack_nibbles`.

    Args:
        packed: Codes, (..., ⌈out_features / 2⌉), uint8.
        out_features: Columns to return.

    Returns:
        Numbers from 0 to 15, (..., out_features), uint8.
    """
    halves = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return halves.flatten(-2)[..., :out_features]


def dequantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight that the codes encode, `(code - zero) · scale`.

    Args:
        codes: Channel-major codes: int8 or float8_e4m3fn (in_features, out_features), or packed
            int4 (in_features, ⌈out_features / 2⌉), uint8.
        scales: One per group of input channels and output, (groups, out_features).
        zeros: Code of zero, (groups, out_features), uint8; int4 only. `None` means 8.
        group_size: Input channels that share a scale; the last group may be shorter.
        dtype: Dtype of the result; float32 arithmetic, float64 where that is asked for.

    Returns:
        Channel-major weight, (in_features, out_features).
    """
    wide = torch.promote_types(dtype, torch.float32)
    in_features, out_features = len(codes), scales.shape[1]
    weight = torch.empty(in_features, out_features, dtype=dtype, device=codes.device)
    # Whole groups at once, then the rest, which is shorter.
    whole = in_features // group_size
    for first, number, size in ((0, whole, group_size), (whole, 1, in_features % group_size)):
        if not number * size:
            continue
        rows = slice(first * group_size, first * group_size + number * size)
        groups = slice(first, first + number)
        row = None if zeros is None else zeros[groups, None]
        integers = codes[rows].view(number, size, -1)
        scaled = _integers(integers, out_features, row, wide).mul_(scales[groups, None].to(wide))
        weight[rows] = scaled.flatten(0, 1)
    return weight


def quantized_gemv(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    threshold: float | Tensor,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply the kept activations with a quantized weight.

    `Σ_groups scales[group] · (Σ_{j kept in group} (x_j - shift_j) · (codes[j] - zeros[group]))`
    plus `bias`: the sum of a group is scaled once.

    Args:
        x: Activations, (..., in_features), any float dtype.
        codes: Codes in the layout that `dequantized` describes, and so the next three.
        scales: One per group of input channels and output, (groups, out_features).
        zeros: Code of zero, (groups, out_features), uint8; int4 only. `None` means 8.
        group_size: Input channels that share a scale.
        threshold: Cut-off in score units; below zero everything is kept: the dense product.
        score_scale: Score weight per channel, (in_features,).
        shift: Centre per channel, (in_features,); `shift @ weight` belongs into `bias`.
        bias: Added to the product, (out_features,).
        accumulate: Dtype of all sums; float64 gives the product that kernels are measured
            against.

    Returns:
        Product, (..., out_features), in the dtype of `x`, or in float64 where it is summed in that.
    """
    kept = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    if isinstance(threshold, Tensor) or threshold >= 0:
        keep = keep_mask(x, threshold, score_scale, shift)
        kept = torch.where(keep, kept, torch.zeros((), dtype=x.dtype, device=x.device))
    out_features = scales.shape[1]
    product = torch.zeros(*x.shape[:-1], out_features, dtype=accumulate, device=x.device)
    for group, rows in enumerate(_groups(len(codes), group_size)):
        integers = _integers(codes[rows], out_features, _row(zeros, group), accumulate)
        product += (kept[..., rows].to(accumulate) @ integers) * scales[group].to(accumulate)
    if bias is not None:
        product += bias.to(accumulate)
    return product if accumulate == torch.float64 else product.to(x.dtype)


def _groups(in_features: int, group_size: int) -> list[slice]:
    return [slice(start, start + group_size) for start in range(0, in_features, group_size)]


def _row(zeros: Tensor | None, group: int) -> Tensor | None:
    return None if zeros is None else zeros[group]


def _integers(codes: Tensor, out_features: int, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `code - zero` of some channels, (..., out_features), exact in `dtype`."""
    if codes.dtype != INT4:
        return codes.to(dtype)
    unsigned = unpack_nibbles(codes, out_features).to(dtype)
    return unsigned - (INT4_MIDDLE if zeros is None else zeros.to(dtype))
