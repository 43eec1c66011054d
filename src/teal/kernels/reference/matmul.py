"""The definition of every mask and product, in plain PyTorch; also the fallback on any device."""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def keep_mask(
    x: Tensor,
    threshold: float | Tensor,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Decide which activations are kept: `|x - shift| * score_scale > threshold`.

    The comparison is written as "dropped when ≤", so NaN and inf are kept and stay visible. All
    arithmetic is in float32, whatever the dtype of `x`.

    Args:
        x: Activations, (..., in_features), any float dtype.
        threshold: Cut-off in score units, rounded to float32 where it is a Python float.
        score_scale: Score weight per channel, (in_features,). `None` means all ones.
        shift: Centre per channel, (in_features,). `None` means zero.

    Returns:
        True where the activation is kept, (..., in_features), bool.
    """
    score = x.float()
    if shift is not None:
        score = score - shift.float()
    score = score.abs()
    if score_scale is not None:
        score = score * score_scale.float()
    return ~(score <= threshold)


def sparse_activation(
    x: Tensor,
    threshold: float | Tensor,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Replace the dropped activations by `shift`, or by zero where there is none.

    Args:
        x: Activations, (..., in_features).
        threshold: Cut-off in score units, rounded to float32 where it is a Python float.
        score_scale: Score weight per channel, (in_features,). `None` means all ones.
        shift: Centre per channel, (in_features,). `None` means zero.

    Returns:
        Activations with the dropped entries replaced, (..., in_features), in the dtype of `x`.
    """
    filler = torch.zeros((), dtype=x.dtype, device=x.device) if shift is None else shift.to(x.dtype)
    return torch.where(keep_mask(x, threshold, score_scale, shift), x, filler)


def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float | Tensor,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply the kept activations with `weight`: `Σ_{j kept} (x_j - shift_j) · W[j, :] + bias`.

    With a `shift`, every product also contains the constant `shift @ weight`. The caller folds it
    into `bias` once (`fold_shift`).

    Args:
        x: Activations, (..., in_features), any float dtype.
        weight: Channel-major weight, (in_features, out_features), in the dtype of `x`.
        threshold: Cut-off in score units; below zero everything is kept: the dense product.
        score_scale: Score weight per channel, not negative, (in_features,).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).

    Returns:
        Product, (..., out_features), in the dtype of `x`, accumulated as torch's matmul does.
    """
    kept = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    if isinstance(threshold, Tensor) or threshold >= 0:
        keep = keep_mask(x, threshold, score_scale, shift)
        kept = torch.where(keep, kept, torch.zeros((), dtype=x.dtype, device=x.device))
    product = kept @ weight
    return product if bias is None else product + bias


def keeps_everything(thresholds: Sequence[float]) -> bool:
    """Say whether no part drops anything, so that the product is a dense one."""
    return max(thresholds, default=-1.0) < 0


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


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Divide `x` by its root mean square and multiply with `norm_weight`, as LlamaRMSNorm does.

    Args:
        x: Hidden states, (..., in_features).
        norm_weight: Weight of the norm, (in_features,).
        eps: Added to the mean square.

    Returns:
        (..., in_features), in the dtype of `x`; computed in float32, rounded before and after the
        multiplication with `norm_weight`.
    """
    mean_square = x.float().square().mean(-1, keepdim=True)
    normed = (x.float() * torch.rsqrt(mean_square + eps)).to(x.dtype)
    return (norm_weight.float() * normed.float()).to(x.dtype)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    output_sizes: Sequence[int],
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply `x` with weights beside each other, each with a mask of its own.

    Args:
        x: Activations, (..., in_features).
        weight: Channel-major weights of all parts, (in_features, out_features).
        thresholds: One per part.
        output_sizes: Columns of each part, summing to out_features.
        score_scale: Score weights, (parts, in_features).
        shift: Centre per channel, shared by the parts, (in_features,).
        bias: Added to the product, (out_features,).

    Returns:
        The products beside each other, (..., out_features), in the dtype of `x`.
    """
    if keeps_everything(thresholds):
        return sparse_gemv(x, weight, -1.0, None, shift, bias)
    columns = torch.split(weight, list(output_sizes), dim=1)
    biases = [None] * len(output_sizes) if bias is None else torch.split(bias, list(output_sizes))
    scales = [None] * len(output_sizes) if score_scale is None else score_scale.unbind()
    parts = zip(columns, thresholds, scales, biases, strict=True)
    return torch.cat([sparse_gemv(x, w, t, s, shift, b) for w, t, s, b in parts], dim=-1)


def gate_and_up(both: Tensor, activation: str) -> Tensor:
    """Return `activation(gate) · up`.

    Args:
        both: Gate and up beside each other, (..., 2 · intermediate_size).
        activation: "silu" or "gelu_pytorch_tanh", as in Hugging Face configurations.

    Returns:
        (..., intermediate_size), in the dtype of `both`.
    """
    gate, up = both.chunk(2, dim=-1)
    return GATES[activation](gate) * up
