"""Is the sparse model still good? Perplexity, KL divergence and agreement with the dense model."""

from teal.evaluation.comparison import Evaluation, compare, evaluate

__all__ = ["Evaluation", "compare", "evaluate"]
