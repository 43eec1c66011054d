"""The only door to the kernels: what the operations are, what they accept, who computes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from teal.kernels import dispatch
from teal.kernels.registration import NORM, VECTORS, registered

_SCHEMAS = (
    f"sparse_gemv(Tensor x, Tensor weight, float threshold, {VECTORS}) -> Tensor",
    f"sparse_linear(Tensor x, Tensor weight, float[] thresholds, SymInt[] output_sizes, {VECTORS}, "
    f"Tensor? residual=None, {NORM}) -> Tensor",
    f"sparse_glu(Tensor x, Tensor weight, float[] thresholds, str activation, {VECTORS}, "
    f"{NORM}) -> Tensor",
    "attend(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor cosines, "
    "Tensor sines, *, float scale, int window=0, float softcap=0.0, Tensor? q_norm_weight=None, "
    "Tensor? k_norm_weight=None, float eps=0.0) -> Tensor",
    "lm_head_gemv(Tensor x, Tensor weight) -> Tensor",
)


def sparse_gemv(
    x: Tensor,
    weight: Tensor,
    threshold: float,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply the kept activations with `weight`; see `reference.sparse_gemv`.

    Args:
        x: Activations, (..., in_features), any float dtype.
        weight: Channel-major weight, (in_features, out_features), in the dtype of `x`.
        threshold: Cut-off in score units; below zero for the dense product.
        score_scale: Score weight per channel, (in_features,).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).

    Returns:
        Product, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes or dtypes do not fit together.
    """
    result: Tensor = torch.ops.teal.sparse_gemv(x, weight, threshold, score_scale, shift, bias)
    return result


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    output_sizes: Sequence[int],
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute up to three products of one input, such as q, k and v, in one launch.

    Args:
        x: Activations, (..., in_features); hidden states before the norm where `norm_weight` is
            given.
        weight: Channel-major weights beside each other, (in_features, out_features).
        thresholds: One per part; a part with one below zero is dense.
        output_sizes: Columns of each part, summing to out_features.
        score_scale: Score weights, (parts, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).
        residual: Added to the result, (..., out_features).
        norm_weight: Weight of an RMSNorm that `x` goes through first, (in_features,).
        eps: Of that norm.

    Returns:
        Products beside each other, (..., out_features), in the dtype of `x`.

    Raises:
        UserError: Shapes or dtypes do not fit together.
    """
    result: Tensor = torch.ops.teal.sparse_linear(
        x, weight, thresholds, output_sizes, score_scale, shift, bias, residual, norm_weight, eps
    )
    return result


def sparse_glu(
    x: Tensor,
    weight: Tensor,
    thresholds: Sequence[float],
    activation: str,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute `activation(x · gate) · (x · up)` in one launch, gate and up beside each other.

    Args:
        x: Activations, (..., in_features); hidden states before the norm where `norm_weight` is
            given.
        weight: Channel-major gate and up, (in_features, 2 · intermediate_size).
        thresholds: Of gate and of up.
        activation: "silu" or "gelu_pytorch_tanh".
        score_scale: Score weights, (2, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the products, (2 · intermediate_size,).
        norm_weight: Weight of an RMSNorm that `x` goes through first, (in_features,).
        eps: Of that norm.

    Returns:
        (..., intermediate_size), in the dtype of `x`.

    Raises:
        UserError: Shapes or dtypes do not fit together, or the activation is unknown.
    """
    result: Tensor = torch.ops.teal.sparse_glu(
        x, weight, thresholds, activation, score_scale, shift, bias, norm_weight, eps
    )
    return result


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
    """Append one token per stream to its cache, in place, and attend from it to the cache.

    See `reference_attention.attend`. The caller sees to it that every position is below the
    capacity.

    Args:
        qkv: Queries, keys and values beside each other, (T, (heads + 2 · kv_heads) · head_dim).
        keys: Cache, (T, kv_heads, capacity, head_dim), contiguous, in the dtype of `qkv`.
        values: As `keys`.
        positions: Index of the new token of each stream, (T,), int64.
        cosines: RoPE, (≥ capacity, rotary_dim / 2), float32.
        sines: As `cosines`.
        scale: Factor of the scores.
        window: How many tokens attention covers at most, the new one included; 0 for all.
        softcap: Where positive, a score becomes `softcap · tanh(score / softcap)`.
        q_norm_weight: Weight of an RMSNorm per head before RoPE, (head_dim,).
        k_norm_weight: The same for keys.
        eps: Of these norms.

    Returns:
        (T, heads · head_dim), in the dtype of `qkv`.

    Raises:
        UserError: Shapes, dtypes, devices or strides do not fit together.
    """
    result: Tensor = torch.ops.teal.attend(
        qkv, keys, values, positions, cosines, sines, scale=scale, window=window,
        softcap=softcap, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
    )  # fmt: skip
    return result


def lm_head_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply with a dense weight that lies as rows: the embedding that serves as a tied head.

    Args:
        x: Activations, (..., in_features).
        weight: (out_features, in_features), in the dtype of `x`.

    Returns:
        `x @ weight.T`, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    result: Tensor = torch.ops.teal.lm_head_gemv(x, weight)
    return result


def _fake_gemv(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    del rest
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _fake_gated(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    del rest
    return x.new_empty((*x.shape[:-1], weight.shape[1] // 2))


def _fake_rows(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_attend(qkv: Tensor, keys: Tensor, *rest: object, **options: object) -> Tensor:
    del rest, options
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]))


# The registration lives as long as this object.
_LIBRARY = registered(
    "DEF",
    _SCHEMAS,
    dispatch.IMPLEMENTATIONS,
    {
        "sparse_gemv": _fake_gemv,
        "sparse_linear": _fake_gemv,
        "sparse_glu": _fake_gated,
        "lm_head_gemv": _fake_rows,
        "attend": _fake_attend,
    },
)
