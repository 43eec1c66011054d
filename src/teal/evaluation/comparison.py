"""Scores dense and sparse models side by side on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teal.data import TokenWindows
from teal.evaluation.scores import AgreementSums, NllSums, Score, SparseScore, log_probabilities
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.linear import SparsityMeter, first_sparse
from teal.models.weight_format import warn_of_format, weight_format_of
from teal.plan import SparsityPlan
from teal.sparsification import densify, insert_plan, measure_sparsity


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a dense model and of its sparse versions on the same tokens.

    Attributes:
        dense: Score without a plan.
        sparse: Score with each plan, in the order given.
        tokens: Tokens scored.
        sparse_from: Fraction of each window after which tokens are sparse and scored.
        sequence_length: Tokens per window.
    """

    dense: Score
    sparse: tuple[SparseScore, ...]
    tokens: int
    sparse_from: float
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form; "sparse" is there only with exactly one plan."""
        scores: dict[str, Any] = {"dense": self.dense.to_dict()}
        if len(self.sparse) == 1:
            scores["sparse"] = self.sparse[0].to_dict()
        return scores | {
            "tokens": self.tokens,
            "sparse_from": self.sparse_from,
            "sequence_length": self.sequence_length,
        }


def evaluate(
    model: Any,
    tokens: TokenWindows | Tensor,
    plan: SparsityPlan | None = None,
    *,
    sparse_from: float = 0.5,
    progress: Progress = silent,
) -> Evaluation:
    """Score a model dense and, with a plan, sparse, in one pass over a text.

    Args:
        model: A Hugging Face causal language model; it is dense afterwards.
        tokens: Token windows, or token ids, (windows, sequence_length), int64.
        plan: The plan to score; without one, only the dense model is scored.
        sparse_from: The tokens at positions ≥ `sparse_from` · sequence length of each window are
            sparse, and exactly the tokens predicted from these positions are scored.
        progress: Shows progress over the windows.

    Raises:
        UserError: No token would be scored, the plan is for another model, or logits are NaN.
    """
    plans = [] if plan is None else [plan]
    return compare(model, tokens, plans, sparse_from=sparse_from, progress=progress)


@torch.no_grad()
def compare(
    model: Any,
    tokens: TokenWindows | Tensor,
    plans: Sequence[SparsityPlan | None],
    *,
    reference: Any = None,
    sparse_from: float = 0.5,
    progress: Progress = silent,
) -> Evaluation:
    """Score a model with several plans beside a dense one, which runs once.

    Args:
        model: A Hugging Face causal language model; it is dense afterwards.
        tokens: Token windows, or token ids, (windows, sequence_length), int64.
        plans: Plans to score; `None` drops nothing.
        reference: Dense model that KL and agreement are measured against; by default `model`.
        sparse_from: Fraction of each window after which tokens are sparse and scored.
        progress: Shows progress over the windows.

    Raises:
        UserError: No token would be scored, a plan is for another model, or logits are NaN.
    """
    reference = model if reference is None else reference
    windows = tokens.tokens if isinstance(tokens, TokenWindows) else tokens
    scored = _scored_positions(windows.shape[1], sparse_from)
    _warn_of_formats(model, plans)
    dense_sums, contenders = NllSums(), [_Contender(plan) for plan in plans]
    try:
        for window in progress(torch.split(windows, 1), "evaluate"):
            targets = window[0, scored + 1].to(model.device)
            dense = log_probabilities(_logits(densify(reference), window, scored))
            dense_sums.add(dense, targets)
            for contender in contenders:
                contender.prepare(model, sparse_from)
                with measure_sparsity(model, contender.meters):
                    sparse = log_probabilities(_logits(model, window, scored))
                contender.nll.add(sparse, targets)
                contender.agreement.add(dense, sparse)
    finally:
        densify(model)
    return Evaluation(
        dense=Score(nll=dense_sums.mean, standard_error=dense_sums.standard_error),
        sparse=tuple(contender.score() for contender in contenders),
        tokens=dense_sums.tokens,
        sparse_from=sparse_from,
        sequence_length=windows.shape[1],
    )


@dataclass
class _Contender:
    """Running sums of one plan, or of the model without one."""

    plan: SparsityPlan | None
    nll: NllSums = field(default_factory=NllSums)
    agreement: AgreementSums = field(default_factory=AgreementSums)
    meters: dict[str, SparsityMeter] = field(default_factory=dict)

    def prepare(self, model: Any, sparse_from: float) -> None:
        if self.plan is None:
            densify(model)
        else:
            insert_plan(model, self.plan, sparse_from=sparse_from)

    def score(self) -> SparseScore:
        return SparseScore(
            nll=self.nll.mean,
            standard_error=self.nll.standard_error,
            effective_sparsity=self._effective_sparsity(),
            kl=self.agreement.kl / self.agreement.tokens,
            top1_agreement=self.agreement.agreed / self.agreement.tokens,
        )

    def _effective_sparsity(self) -> float:
        if self.plan is None:
            return 0.0
        # Projections that the plan keeps dense have no meter and count as 0.
        dropped = {
            name: self.meters[name].sparsity if name in self.meters else 0.0
            for name in self.plan.projections
        }
        return self.plan.model.mean_sparsity(dropped)


def _warn_of_formats(model: Any, plans: Sequence[SparsityPlan | None]) -> None:
    for calibrated in dict.fromkeys(plan.weight_format for plan in plans if plan):
        warn_of_format(calibrated, weight_format_of(model))


def _scored_positions(length: int, sparse_from: float) -> Tensor:
    """Return the sparse positions of a window that have a next token."""
    if not 0.0 <= sparse_from <= 1.0:
        raise UserError(f"sparse_from {sparse_from!r} is outside [0, 1]. Give 0.5 for the paper's.")
    start = first_sparse(length, sparse_from)
    if start >= length - 1:
        raise UserError(
            f"With sparse_from={sparse_from} no token of a window of {length} is predicted from a "
            "sparse position, so there is nothing to score. Give a smaller sparse_from."
        )
    return torch.arange(start, length - 1)


def _logits(model: Any, window: Tensor, positions: Tensor) -> Tensor:
    kept = positions.to(model.device)
    output = model(window.to(model.device), logits_to_keep=kept, use_cache=False)
    logits: Tensor = output.logits[0]
    if logits.isnan().any():
        raise UserError("The logits are NaN. Try another dtype, such as --dtype bfloat16.")
    return logits
