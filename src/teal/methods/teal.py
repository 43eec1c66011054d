"""TEAL (arXiv 2408.14690): drop activations of small magnitude, threshold by quantile of |x|."""

from typing import ClassVar

from teal.methods.base import MaskRule, ScoreQuantiles


class Teal:
    """Keep x_j if |x_j| > t, where t is the sparsity-quantile of |x| on text (section 4.1)."""

    name: ClassVar[str] = "teal"

    def rule(self, statistics: ScoreQuantiles, sparsity: float) -> MaskRule | None:
        """Return a rule with the sparsity-quantile of |x| as its threshold; see `Method.rule`."""
        if sparsity == 0.0:
            return None
        return MaskRule(threshold=statistics.quantile(sparsity))
