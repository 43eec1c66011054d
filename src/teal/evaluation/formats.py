"""Scores sparsity and quantization together: every plan with every format, on the same tokens."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teal.compression import quantize_head, quantize_model
from teal.data import TokenWindows
from teal.evaluation.comparison import Evaluation, compare
from teal.evaluation.scores import Score, SparseScore
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.models.weight_format import weight_format_of
from teal.plan import SparsityPlan
from teal.quantization import FLOAT, Scheme

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the weights of a model are quantized for a comparison.

    Attributes:
        scheme: How projections are quantized; `None` leaves them as they are.
        quantize_head: Whether the output head is quantized to int8.
    """

    scheme: Scheme | None = None
    quantize_head: bool = False

    @property
    def is_as_it_is(self) -> bool:
        """Whether nothing is quantized."""
        return self.scheme is None and not self.quantize_head


@dataclass(frozen=True, kw_only=True)
class FormatScore:
    """Score of one plan with one weight format.

    Attributes:
        weight_format: Format of the projections: "float", "int8", "int4" or "fp8".
        group_size: Input channels per scale, for int4.
        head_format: "int8" if the head is quantized, else "float".
        plan: The plan; `None` drops nothing.
        score: Score; KL and agreement are relative to the dense model as it is.
    """

    weight_format: str
    group_size: int | None
    head_format: str
    plan: SparsityPlan | None
    score: SparseScore

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        plan = self.plan
        return {
            "weight_format": self.weight_format,
            "group_size": self.group_size,
            "head_format": self.head_format,
            "strategy": plan.strategy if plan else None,
            "target_sparsity": plan.target_sparsity if plan else 0.0,
            "calibrated_with": plan.weight_format if plan else None,
            **self.score.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class FormatEvaluation:
    """Scores of formats and plans on the same tokens.

    Attributes:
        weight_format: Format of the model as it is.
        dense: Score of the model as it is.
        rows: Grouped by format; each format but the model's own begins with a row without a plan.
        tokens: Tokens scored.
        sparse_from: Fraction of each window after which tokens are sparse and scored.
        sequence_length: Tokens per window.
    """

    weight_format: str
    dense: Score
    rows: tuple[FormatScore, ...]
    tokens: int
    sparse_from: float
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return {
            "weight_format": self.weight_format,
            "dense": self.dense.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "tokens": self.tokens,
            "sparse_from": self.sparse_from,
            "sequence_length": self.sequence_length,
        }


def compare_formats(
    model: Any,
    tokens: TokenWindows | Tensor,
    formats: Sequence[WeightFormat],
    plans: Sequence[SparsityPlan],
    *,
    sparse_from: float = 0.5,
    progress: Progress = silent,
) -> FormatEvaluation:
    """Score every plan with every format beside the dense model as it is.

    Each format is scored with the plans calibrated for it; if there are none, with those calibrated
    for floats, or else with all of them. Plans that no format uses are logged. At most one
    quantized copy of the model is in memory at a time.

    Args:
        model: A dense Hugging Face causal language model.
        tokens: Token windows, or token ids, (windows, sequence_length), int64.
        formats: Formats to score, at least one.
        plans: Plans to score.
        sparse_from: Fraction of each window after which tokens are sparse and scored.
        progress: Shows progress over the windows.

    Raises:
        UserError: `evaluate` raises it; or there is no format, the model is quantized already, or
            the group size does not divide its projections.
    """
    if not formats:
        raise UserError("There is no format to compare. Give at least one WeightFormat.")
    rows: list[FormatScore] = []
    unused = list(plans)
    for weight_format in formats:
        candidate = _quantized(model, weight_format, progress)
        chosen: list[SparsityPlan | None] = [*plans_for(weight_format_of(candidate), plans)]
        unused = [plan for plan in unused if plan not in chosen]
        if candidate is not model:
            chosen.insert(0, None)
        result = compare(
            candidate,
            tokens,
            chosen,
            reference=model,
            sparse_from=sparse_from,
            progress=progress,
        )
        rows += _format_scores(candidate, weight_format, chosen, result)
        # Free its memory before the next copy is made.
        del candidate
    for plan in unused:
        _log.warning(
            "A plan for %s weights was not scored: the formats have plans of their own or for "
            "floats. Leave it out, or add --quantize %s.",
            plan.weight_format,
            plan.weight_format,
        )
    return FormatEvaluation(
        weight_format=weight_format_of(model),
        dense=result.dense,
        rows=tuple(rows),
        tokens=result.tokens,
        sparse_from=sparse_from,
        sequence_length=result.sequence_length,
    )


def plans_for(weight_format: str, plans: Sequence[SparsityPlan]) -> list[SparsityPlan]:
    """Return the plans calibrated for a format; if there are none, those for floats, or all."""
    for wanted in (weight_format, FLOAT):
        found = [plan for plan in plans if plan.weight_format == wanted]
        if found:
            return found
    return list(plans)


def _format_scores(
    model: Any,
    weight_format: WeightFormat,
    plans: Sequence[SparsityPlan | None],
    result: Evaluation,
) -> list[FormatScore]:
    return [
        FormatScore(
            weight_format=weight_format_of(model),
            group_size=weight_format.scheme.group_size if weight_format.scheme else None,
            head_format="int8" if weight_format.quantize_head else FLOAT,
            plan=plan,
            score=score,
        )
        for plan, score in zip(plans, result.sparse, strict=True)
    ]


def _quantized(model: Any, weight_format: WeightFormat, progress: Progress) -> Any:
    if weight_format.is_as_it_is:
        return model
    candidate = copy.deepcopy(model)
    if weight_format.scheme:
        quantize_model(candidate, weight_format.scheme, progress=progress)
    if weight_format.quantize_head:
        quantize_head(candidate)
    return candidate
