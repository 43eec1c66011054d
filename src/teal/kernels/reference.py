"""The definition of every mask and product, in plain PyTorch; also the fallback on any device."""

import torch
from torch import Tensor


def keep_mask(
    x: Tensor, threshold: float | Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Decide which activations are kept: those with a score `|x - shift| * scale` > threshold.

    The comparison is written as "dropped when ≤", so NaN and inf are kept and stay visible. All
    arithmetic is in float32, whatever the dtype of `x`.

    Args:
        x: Activations, (..., in_features), any float dtype.
        threshold: Cut-off in score units, rounded to float32 where it is a Python float.
        scale: Score weight per channel, (in_features,). `None` means all ones.
        shift: Centre per channel, (in_features,). `None` means zero.

    Returns:
        True where the activation is kept, (..., in_features), bool.
    """
    score = x.float()
    if shift is not None:
        score = score - shift.float()
    score = score.abs()
    if scale is not None:
        score = score * scale.float()
    return ~(score <= threshold)


def sparse_activation(
    x: Tensor, threshold: float | Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Replace the dropped activations by `shift`, or by zero where there is none.

    Args:
        x: Activations, (..., in_features).
        threshold: As in `keep_mask`.
        scale: As in `keep_mask`.
        shift: As in `keep_mask`.

    Returns:
        Activations with the dropped entries replaced, (..., in_features), in the dtype of `x`.
    """
    filler = torch.zeros((), dtype=x.dtype, device=x.device) if shift is None else shift.to(x.dtype)
    return torch.where(keep_mask(x, threshold, scale, shift), x, filler)


def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply the kept activations with `weight`: `Σ_{j kept} (x_j - shift_j) · W[j, :] + bias`.

    With a `shift`, the constant part of the dropped entries, `shift @ weight`, is the caller's to
    fold into `bias` once (`fold_shift`); no input changes it.

    Args:
        x: Activations, (..., in_features), any float dtype.
        weight: Channel-major weight, (in_features, out_features), in the dtype of `x`.
        threshold: As in `keep_mask`.
        scale: As in `keep_mask`.
        shift: As in `keep_mask`.
        bias: Added to the product, (out_features,).

    Returns:
        Product, (..., out_features), in the dtype of `x`, accumulated as torch's matmul does.
    """
    keep = keep_mask(x, threshold, scale, shift)
    centred = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    product = torch.where(keep, centred, torch.zeros((), dtype=x.dtype, device=x.device)) @ weight
    return product if bias is None else product + bias


def fold_shift(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `bias + shift @ weight`, the constant that a rule with a shift adds to every product.

    Args:
        weight: Channel-major weight, (in_features, out_features).
        shift: Centre per channel, (in_features,).
        bias: Bias of the projection, (out_features,).

    Returns:
        Bias for `sparse_gemv`, (out_features,), in the dtype of `weight`, summed in float32.
    """
    constant = shift.float() @ weight.float()
    return (constant if bias is None else constant + bias.float()).to(weight.dtype)
