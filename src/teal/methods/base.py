"""The mask rule, which a method hands to the runtime, and the interface of a method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from teal.foundation.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskRule:
    """Drop an activation when `|x - shift| * score_scale <= threshold`.

    Attributes:
        threshold: Cut-off in score units, ≥ 0, rounded to the nearest float32.
        score_scale: Factor on the score per channel, (in_features,), or `None` for all ones.
        shift: Centre per channel, (in_features,), or `None` for zero. Dropped entries are set to
            it.
    """

    threshold: float
    score_scale: Tensor | None = None
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        # Negated so that NaN fails too.
        if not self.threshold >= 0.0:
            raise UserError(f"Threshold {self.threshold!r} is not a number ≥ 0. Calibrate anew.")
        # Masks compare in float32; with a rounded threshold all kernels agree.
        rounded = torch.tensor(self.threshold, dtype=torch.float32).item()
        object.__setattr__(self, "threshold", rounded)

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """The per-channel tensors that are set, by name."""
        named = {"score_scale": self.score_scale, "shift": self.shift}
        return {name: vector for name, vector in named.items() if vector is not None}


class ScoreQuantiles(Protocol):
    """Statistics of one projection input, as far as a method needs them."""

    def quantile(self, sparsity: float) -> float:
        """Return the `sparsity`-quantile of |x|, with `sparsity` in [0, 1)."""
        ...


class Method(Protocol):
    """A published rule for choosing activations, named after its paper.

    Every method has a row in the conformance suite (`tests/methods/test_conformance.py`) and a
    page in `docs/methods/`.
    """

    name: ClassVar[str]

    def rule(self, statistics: ScoreQuantiles, sparsity: float) -> MaskRule | None:
        """Return the rule that drops a fraction `sparsity` of one projection input.

        Args:
            statistics: Calibration statistics of the input.
            sparsity: Target in [0, 1).

        Returns:
            The rule, or `None` for a projection that stays dense, as every one does at sparsity 0.
        """
        ...
