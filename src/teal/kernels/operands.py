"""The operands of a product: what every form, format and device has in common.

Shapes use the legend `T` token rows, `K` in_features, `N` out_features, `P` parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Projections that share an input: q, k and v.
MAX_PARTS = 3


class Operands(NamedTuple):
    """Operands of up to `MAX_PARTS` products of one input, or of gate and up.

    The weights of the parts lie beside each other in one tensor, each with a threshold of its own.
    A named tuple: one is made per product, at a fifth of the cost of a frozen dataclass.

    Attributes:
        x: Activations, (..., K), any float dtype; with `norm_weight`, the hidden states before the
            norm.
        weight: Channel-major weight, (K, N), in the dtype of `x`; or the codes of a quantized
            weight, which `QuantParams` decode: int8 or float8_e4m3fn (K, N), or int4 packed in
            uint8, (K, ⌈N / 2⌉).
        thresholds: P cut-offs in score units; an activation is dropped where
            `|x - shift| · score_scale <= threshold`. A part with one below zero is dense.
        output_sizes: Columns of each of P parts, summing to N.
        score_scale: Factor of the scores, (P, K), float32.
        shift: Centre of each channel, (K,), float32; `x - shift` is multiplied, and the constant
            `shift @ weight` belongs into `bias` (`fold_shift`).
        bias: Added to the product, (N,), in the dtype of `x`.
        residual: Added after the bias, (..., N), in the dtype of `x`.
        norm_weight: Weight of an RMSNorm that `x` goes through first, (K,).
        eps: Added to the mean square in that norm.
        activation: "silu" or "gelu_pytorch_tanh" for `activation(gate) · up` of two parts, which
            halves the columns of the result; `None` for parts beside each other.
        tuning: Folder of tuning tables, "" for those of the package. It never changes the meaning
            of a product, only the order in which its sums are added.
    """

    x: Tensor
    weight: Tensor
    thresholds: Sequence[float]
    output_sizes: Sequence[int]
    score_scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 0.0
    activation: str | None = None
    tuning: str = ""

    @property
    def rows(self) -> int:
        """Token rows of `x`."""
        return math.prod(self.x.shape[:-1])


class QuantParams(NamedTuple):
    """What decodes a quantized weight: it is `(code - zero) · scale`.

    The codes take the place of the weight in `Operands`.

    Attributes:
        scales: One per group of input channels and output, (groups, N), any float dtype.
        zeros: Code of zero, (groups, N), uint8; int4 only. `None` means 8 for int4, else 0.
        group_size: Input channels that share a scale; the last group may be shorter.
    """

    scales: Tensor
    zeros: Tensor | None
    group_size: int


def padded_thresholds(thresholds: Sequence[float]) -> tuple[float, float, float]:
    """Return one threshold per possible part, with zeros for those that do not exist."""
    first, second, third = (*thresholds, 0.0, 0.0)[:MAX_PARTS]
    return first, second, third


def part_starts(output_sizes: Sequence[int]) -> tuple[int, int]:
    """Return the first columns of the second and third part, N for those that do not exist."""
    columns = sum(output_sizes)
    starts = [sum(output_sizes[:part]) for part in range(1, len(output_sizes))]
    second, third = (*starts, columns, columns)[: MAX_PARTS - 1]
    return second, third
