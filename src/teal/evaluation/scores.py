"""Per-token scores of a model on a text, accumulated window by window."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """Quality of a model's predictions on a text.

    Attributes:
        nll: Mean negative log-likelihood, nats per token.
        standard_error: Standard error of `nll` over windows, whose tokens are not independent;
            `None` for a single window.
    """

    nll: float
    standard_error: float | None

    @property
    def perplexity(self) -> float:
        """`exp(nll)`."""
        return math.exp(self.nll)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.standard_error is None else self.perplexity * self.standard_error

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return {
            "nll": self.nll,
            "perplexity": self.perplexity,
            "standard_error": self.perplexity_error,
        }


@dataclass(frozen=True, kw_only=True)
class SparseScore(Score):
    """Quality of a sparse or quantized model's predictions, and its distance from a dense model.

    Attributes:
        effective_sparsity: Fraction of the planned projections' inputs dropped at sparse tokens,
            weighted by weight size.
        kl: Mean KL divergence KL(dense ‖ sparse), nats per token.
        top1_agreement: Fraction of tokens for which both rank the same token first.
    """

    effective_sparsity: float
    kl: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        agreement = ("effective_sparsity", "kl", "top1_agreement")
        return super().to_dict() | {name: getattr(self, name) for name in agreement}


@dataclass
class NllSums:
    """Negative log-likelihood, accumulated window by window."""

    windows: list[tuple[float, int]] = field(default_factory=list)

    def add(self, log_probabilities: Tensor, targets: Tensor) -> None:
        """Add one window.

        Args:
            log_probabilities: (tokens, vocabulary), float32.
            targets: The actual next tokens, (tokens,), int64.
        """
        nll = F.nll_loss(log_probabilities, targets, reduction="sum").double().item()
        self.windows.append((nll, len(targets)))

    @property
    def mean(self) -> float:
        """Mean over all tokens."""
        return sum(nll for nll, _ in self.windows) / self.tokens

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(count for _, count in self.windows)

    @property
    def standard_error(self) -> float | None:
        """Cluster-robust standard error of the mean, one cluster per window."""
        clusters = len(self.windows)
        if clusters < 2:
            return None
        spread = sum((nll - self.mean * count) ** 2 for nll, count in self.windows)
        return math.sqrt(spread * clusters / (clusters - 1)) / self.tokens


@dataclass
class AgreementSums:
    """KL divergence and top-1 agreement, accumulated window by window."""

    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Add one window of log-probabilities, both (tokens, vocabulary), float32."""
        kl = F.kl_div(sparse, dense, log_target=True, reduction="sum")
        self.kl += kl.double().item()
        self.agreed += int((dense.argmax(-1) == sparse.argmax(-1)).sum())
        self.tokens += len(dense)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32, (tokens, vocabulary)."""
    return torch.log_softmax(logits.float(), dim=-1)
