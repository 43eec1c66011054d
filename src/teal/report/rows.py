"""The results that a report shows."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DenseRow:
    """How good the dense model is.

    Attributes:
        perplexity: On the evaluation text.
        perplexity_error: Its standard error, or `None` if it is not known.
    """

    perplexity: float
    perplexity_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class SparseRow:
    """How good the model is with one plan, on the text of the dense row.

    Attributes:
        strategy: How the plan spread its sparsity, such as "greedy".
        target_sparsity: Sparsity that was asked for.
        effective_sparsity: Sparsity that was measured on the text.
        perplexity: On the evaluation text.
        perplexity_error: Its standard error, or `None` if it is not known.
        kl: Mean KL divergence from the dense model's predictions, in nats per token.
        top1_agreement: Fraction of tokens whose likeliest successor is that of the dense model.
    """

    strategy: str
    target_sparsity: float
    effective_sparsity: float
    perplexity: float
    perplexity_error: float | None = None
    kl: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text that the model wrote.

    Attributes:
        title: What wrote it, such as "dense".
        prompt: What it was given.
        continuation: What it made of that.
        tokens_per_second: Speed of decoding, or `None` if it was not measured.
    """

    title: str
    prompt: str
    continuation: str
    tokens_per_second: float | None = None
