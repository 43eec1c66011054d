"""The results that a report shows."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DenseRow:
    """Quality of the dense model.

    Attributes:
        perplexity: Perplexity on the evaluation text.
        perplexity_error: Its standard error; `None` if unknown.
    """

    perplexity: float
    perplexity_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class SparseRow:
    """Quality of the model with one plan, on the text of the dense row.

    Attributes:
        strategy: Strategy that allocated the sparsity, such as "greedy".
        target_sparsity: Sparsity that was asked for.
        effective_sparsity: Sparsity measured on the text.
        perplexity: Perplexity on the evaluation text.
        perplexity_error: Its standard error; `None` if unknown.
        kl: Mean KL divergence from the dense model's predictions, in nats per token.
        top1_agreement: Fraction of tokens for which the dense model predicts the same next token.
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
    """A text that the model generated.

    Attributes:
        title: Variant of the model, such as "dense".
        prompt: Text given to the model.
        continuation: Text that the model generated.
        tokens_per_second: Speed of decoding; `None` if it was not measured.
    """

    title: str
    prompt: str
    continuation: str
    tokens_per_second: float | None = None
