"""What one product computes from: the operands that every form and device has in common."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Projections that share an input: q, k and v.
MAX_PARTS = 3


class Operands(NamedTuple):
    """Operands of parts beside each other, or of gate and up.

    A named tuple: made once per product, it costs a fifth of a frozen dataclass.

    Attributes:
        x: Activations, (..., in_features); hidden states before the norm where `norm_weight` is
            given.
        weight: Channel-major weights beside each other, (in_features, out_features).
        thresholds: One per part; all below zero for the dense product.
        output_sizes: Columns of each part, summing to out_features.
        score_scale: Score weights, (parts, in_features).
        shift: Centre per channel, (in_features,).
        bias: Added to the product, (out_features,).
        residual: Added to the result, (..., out_features).
        norm_weight: Weight of an RMSNorm that `x` goes through first, (in_features,).
        eps: Of that norm.
        activation: Of the gate, for `activation(gate) · up`; `None` for parts beside each other.
        tuning: Folder of tuning tables, "" for those of the package.
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
    """What the codes of a quantized weight stand for: `(code - zero) · scale`.

    The codes take the place of the weight in `Operands`; `reference_quantized` explains all three.

    Attributes:
        scales: One per group of input channels and output, (groups, out_features).
        zeros: Code of zero, (groups, out_features), uint8; int4 only.
        group_size: Input channels per group.
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
