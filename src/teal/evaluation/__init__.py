"""Measures quality: perplexity, KL divergence and top-1 agreement with the dense model."""

from teal.evaluation.comparison import Evaluation, compare, evaluate
from teal.evaluation.formats import FormatEvaluation, WeightFormat, compare_formats

__all__ = [
    "Evaluation",
    "FormatEvaluation",
    "WeightFormat",
    "compare",
    "compare_formats",
    "evaluate",
]
