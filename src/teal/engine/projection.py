"""Projections of one input with all their operands but the input, prepared once per rule set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from teal.engine.weights.matrix import KEEP_ALL, Matrix, fold_shift, quant_operands, weight_rows
from teal.foundation.errors import UserError
from teal.kernels.ops import quantized_glu, quantized_linear, sparse_glu, sparse_linear
from teal.kernels.reference.matmul import keeps_everything
from teal.methods import MaskRule

# Maps the input and a residual to the product.
_Product = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ProjectionCall:
    """Projections that share an input, such as q, k and v, or the gate and up of an MLP.

    Attributes:
        weight: Channel-major weights side by side, (in_features, out_features), float or quantized.
        thresholds: Cut-off of each projection in score units; `KEEP_ALL` where it is dense.
        output_sizes: Columns of each projection, summing to out_features.
        activation: "silu" or "gelu_pytorch_tanh" for `activation(gate) · up`; `None` for the
            products themselves.
        score_scale: Score weights, (projections, in_features), float32.
        shift: Centre per channel, (in_features,), float32.
        bias: Added to the products, (out_features,), in the dtype of the activations.
        norm_weight: Weight of an RMSNorm applied to the input first, (in_features,).
        eps: Added to the mean square in that norm.
        tuning: Folder of tuning tables, "" for the tables that the package ships.
    """

    weight: Matrix
    thresholds: tuple[float, ...]
    output_sizes: tuple[int, ...]
    activation: str | None = None
    score_scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 0.0
    tuning: str = ""
    _product: _Product = field(init=False, repr=False)

    def __post_init__(self) -> None:
        product = _linear(self) if self.activation is None else _glu(self, self.activation)
        object.__setattr__(self, "_product", product)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the products, accumulating in float32.

        Args:
            x: Activations, (T, in_features); hidden states before the norm where there is one.
            residual: Added to the result, (T, out_features); only without an activation.

        Returns:
            (T, out_features), with an activation (T, out_features / 2), in the dtype of `x`.
        """
        return self._product(x, residual)

    @property
    def is_dense(self) -> bool:
        """Whether no projection drops anything."""
        return keeps_everything(self.thresholds)

    def with_rules(
        self, rules: Sequence[MaskRule | None], input_name: str, dtype: torch.dtype
    ) -> "ProjectionCall":
        """Return the same dense projections with activations dropped by rules.

        Args:
            rules: One per projection, or one for all where a checkpoint stores them as a single
                projection; `None` stays dense.
            input_name: Name of the input, for the error message.
            dtype: Dtype of the activations, which a bias with a folded shift gets.

        Raises:
            UserError: The rules have different shifts.
        """
        if not any(rules):
            return self
        if len(rules) < len(self.thresholds):
            rules = list(rules) * len(self.thresholds)
        rows = weight_rows(self.weight)
        shift = _shared_shift(rules, rows, input_name)
        return replace(
            self,
            thresholds=tuple(rule.threshold if rule else KEEP_ALL for rule in rules),
            score_scale=_score_scales(rules, rows),
            shift=shift,
            bias=self.bias if shift is None else fold_shift(self.weight, shift, self.bias, dtype),
        )


def _trailing_operands(call: ProjectionCall) -> tuple[Tensor | None, float, str]:
    """Return the operands that every operation takes last."""
    return call.norm_weight, call.eps, call.tuning


# The closures below capture operands and never the call, whose reference to them would be a cycle.
def _linear(call: ProjectionCall) -> _Product:
    weight, thresholds, sizes = call.weight, call.thresholds, call.output_sizes
    score_scale, shift, bias = call.score_scale, call.shift, call.bias
    last = _trailing_operands(call)
    if isinstance(weight, Tensor):

        def product(x: Tensor, residual: Tensor | None) -> Tensor:
            return sparse_linear(
                x, weight, thresholds, sizes, score_scale, shift, bias, residual, *last
            )

        return product
    codes = quant_operands(weight)

    def quantized_product(x: Tensor, residual: Tensor | None) -> Tensor:
        return quantized_linear(
            x, *codes, thresholds, sizes, score_scale, shift, bias, residual, *last
        )

    return quantized_product


def _glu(call: ProjectionCall, activation: str) -> _Product:
    weight, thresholds = call.weight, call.thresholds
    score_scale, shift, bias = call.score_scale, call.shift, call.bias
    last = _trailing_operands(call)
    if isinstance(weight, Tensor):

        def product(x: Tensor, residual: Tensor | None) -> Tensor:
            assert residual is None
            return sparse_glu(x, weight, thresholds, activation, score_scale, shift, bias, *last)

        return product
    codes = quant_operands(weight)

    def quantized_product(x: Tensor, residual: Tensor | None) -> Tensor:
        assert residual is None
        return quantized_glu(x, *codes, thresholds, activation, score_scale, shift, bias, *last)

    return quantized_product


def _score_scales(rules: Sequence[MaskRule | None], rows: Tensor) -> Tensor | None:
    """Return the score weights of all projections, (projections, in_features), float32."""
    scales = [rule.score_scale if rule else None for rule in rules]
    if all(scale is None for scale in scales):
        return None
    ones = torch.ones(len(rows), device=rows.device)
    return torch.stack([ones if scale is None else scale.to(ones) for scale in scales])


def _shared_shift(rules: Sequence[MaskRule | None], rows: Tensor, input_name: str) -> Tensor | None:
    """Return the centre that all rules of an input share, (in_features,), float32."""
    shifts = [rule.shift for rule in rules if rule]
    given = [shift for shift in shifts if shift is not None]
    if not given:
        return None
    if len(given) < len(shifts) or not all(torch.equal(given[0], shift) for shift in given):
        raise UserError(
            f"The rules of projections that read {input_name} have different shifts, and the "
            "engine centres an input once. Make a plan with one shift per input."
        )
    return given[0].to(rows.device, torch.float32)
