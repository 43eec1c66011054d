"""The only door to the kernels: what the operations are called, take and return.

`operands.Operands` and `operands.QuantParams` describe the operands of every product: meaning,
shape and dtype. `dispatch` chooses the backend that computes one.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from teal.kernels import dispatch

_CODES = "Tensor codes, Tensor scales, Tensor? zeros, int group_size"
_PARTS = "float[] thresholds, SymInt[] output_sizes"
_GATE_AND_UP = "float[] thresholds, str activation"
_VECTORS = "Tensor? score_scale=None, Tensor? shift=None, Tensor? bias=None"
_NORM = 'Tensor? norm_weight=None, float eps=0.0, str tuning=""'
_SCHEMAS = (
    f'sparse_gemv(Tensor x, Tensor weight, float threshold, {_VECTORS}, str tuning="") -> Tensor',
    f"sparse_linear(Tensor x, Tensor weight, {_PARTS}, {_VECTORS}, Tensor? residual=None, {_NORM})"
    " -> Tensor",
    f"sparse_glu(Tensor x, Tensor weight, {_GATE_AND_UP}, {_VECTORS}, {_NORM}) -> Tensor",
    f"quantized_linear(Tensor x, {_CODES}, {_PARTS}, {_VECTORS}, Tensor? residual=None, {_NORM})"
    " -> Tensor",
    f"quantized_glu(Tensor x, {_CODES}, {_GATE_AND_UP}, {_VECTORS}, {_NORM}) -> Tensor",
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
    tuning: str = "",
) -> Tensor:
    """Multiply the kept activations with one weight.

    The arguments are those of `Operands` for a single part: one `threshold`, and `score_scale` is
    (in_features,).

    Returns:
        Product, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    result: Tensor = _sparse_gemv(x, weight, threshold, score_scale, shift, bias, tuning)
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
    tuning: str = "",
) -> Tensor:
    """Compute up to three products of one input, such as q, k and v, in one launch.

    The arguments are those of `Operands`.

    Returns:
        Products beside each other, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    result: Tensor = _sparse_linear(
        x, weight, thresholds, output_sizes, score_scale, shift, bias, residual, norm_weight, eps,
        tuning,
    )  # fmt: skip
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
    tuning: str = "",
) -> Tensor:
    """Compute `activation(x · gate) · (x · up)` in one launch, gate and up beside each other.

    The arguments are those of `Operands` for two parts of intermediate_size columns each.

    Returns:
        (..., intermediate_size), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together, or the activation is unknown.
    """
    result: Tensor = _sparse_glu(
        x, weight, thresholds, activation, score_scale, shift, bias, norm_weight, eps, tuning
    )
    return result


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    thresholds: Sequence[float],
    output_sizes: Sequence[int],
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    tuning: str = "",
) -> Tensor:
    """Compute `sparse_linear` with a quantized weight.

    The arguments are those of `Operands`, with `codes` as the weight, and of `QuantParams`.

    Returns:
        Products beside each other, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    result: Tensor = _quantized_linear(
        x, codes, scales, zeros, group_size, thresholds, output_sizes,
        score_scale, shift, bias, residual, norm_weight, eps, tuning,
    )  # fmt: skip
    return result


def quantized_glu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    thresholds: Sequence[float],
    activation: str,
    score_scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    tuning: str = "",
) -> Tensor:
    """Compute `sparse_glu` with a quantized weight.

    The arguments are those of `Operands`, with `codes` as the weight, and of `QuantParams`.

    Returns:
        (..., intermediate_size), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together, or the activation is unknown.
    """
    result: Tensor = _quantized_glu(
        x, codes, scales, zeros, group_size, thresholds, activation,
        score_scale, shift, bias, norm_weight, eps, tuning,
    )  # fmt: skip
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
    """Append one token per sequence to its cache, in place, and attend from it to the cache.

    The arguments are those of `reference.attention.attend`; caches, cosines and sines must be
    contiguous. The caller ensures that every position is below the capacity.

    Returns:
        (T, heads · head_dim), in the dtype of `qkv`.

    Raises:
        UserError: Shapes, dtypes, devices or strides do not fit together.
    """
    result: Tensor = _attend(
        qkv, keys, values, positions, cosines, sines, scale=scale, window=window,
        softcap=softcap, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps,
    )  # fmt: skip
    return result


def lm_head_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply with a dense weight in torch's layout, such as an embedding that is a tied head.

    Args:
        x: Activations, (..., in_features).
        weight: Output-major weight, (out_features, in_features), in the dtype of `x`.

    Returns:
        `x @ weight.T`, (..., out_features), in the dtype of `x`; float32 accumulation.

    Raises:
        UserError: Shapes, dtypes or devices do not fit together.
    """
    result: Tensor = _lm_head_gemv(x, weight)
    return result


def _fake_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _fake_glu(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1] // 2))


def _fake_quantized_linear(x: Tensor, codes: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _fake_quantized_glu(x: Tensor, codes: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1] // 2))


def _fake_attend(qkv: Tensor, keys: Tensor, *_: object, **options: object) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]))


def _fake_lm_head(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_FAKES: Mapping[str, Callable[..., Tensor]] = {
    "sparse_gemv": _fake_linear,
    "sparse_linear": _fake_linear,
    "sparse_glu": _fake_glu,
    "quantized_linear": _fake_quantized_linear,
    "quantized_glu": _fake_quantized_glu,
    "attend": _fake_attend,
    "lm_head_gemv": _fake_lm_head,
}


def _registered() -> torch.library.Library:
    """Make the operations known to torch, which forgets them when the result is deleted."""
    library = torch.library.Library("teal", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    for name, implementation in dispatch.IMPLEMENTATIONS.items():
        # For tensors of any device: dispatch looks at their device itself.
        library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"teal::{name}", _FAKES[name], lib=library)
    return library


_LIBRARY = _registered()
# Looked up once: that takes a quarter of a microsecond, and a token calls some two hundred.
_sparse_gemv = torch.ops.teal.sparse_gemv.default
_sparse_linear = torch.ops.teal.sparse_linear.default
_sparse_glu = torch.ops.teal.sparse_glu.default
_quantized_linear = torch.ops.teal.quantized_linear.default
_quantized_glu = torch.ops.teal.quantized_glu.default
_attend = torch.ops.teal.attend.default
_lm_head_gemv = torch.ops.teal.lm_head_gemv.default
