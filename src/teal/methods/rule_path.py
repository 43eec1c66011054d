"""The rules of a model at every sparsity up to a limit, to select from at run time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.methods.base import MaskRule

# Target sparsity and rule by projection.
Planned = Mapping[str, tuple[float, MaskRule | None]]

_NO_RULE = -1.0
_TENSORS = ("sparsities", "targets", "thresholds")


@dataclass(frozen=True, kw_only=True, eq=False)
class RulePath:
    """Target sparsity and rule of every projection at several budgets, from dense upwards.

    Only thresholds change along a path; a projection keeps its score scale and shift.

    Attributes:
        projections: Dotted module names, one per column.
        sparsities: Sparsity budget of each point, (points,), float64, rising from 0.
        targets: Target sparsities, (points, projections), float64.
        thresholds: Thresholds, (points, projections), float32; negative if there is no rule.
        vectors: Score scale and shift, by projection and name, of projections that have any.
    """

    projections: tuple[str, ...]
    sparsities: Tensor
    targets: Tensor
    thresholds: Tensor
    vectors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (*self.sparsities.shape, len(self.projections))
        if len(shape) != 2 or self.targets.shape != shape or self.thresholds.shape != shape:
            raise ValueError("the path has a target or threshold too many or too few")
        # Negated so that NaN and an empty path fail too.
        rises = bool((self.sparsities.diff() > 0).all()) and self.sparsities[:1].tolist() == [0.0]
        if not rises or not self.end < 1.0 or bool(self.targets[0].any()):
            raise ValueError("the path does not rise from 0 to less than 1")

    @classmethod
    def from_points(cls, points: Mapping[float, Planned]) -> "RulePath | None":
        """Build a path from the rules at several sparsity budgets.

        Args:
            points: Target sparsity and rule of every projection by budget; 0 must be among them.

        Returns:
            The path, or `None` if a score scale or shift changes along it.
        """
        vectors: dict[str, Mapping[str, Tensor]] = {}
        for planned in points.values():
            for name, (_, rule) in planned.items():
                if rule and not _same(vectors.setdefault(name, rule.vectors), rule.vectors):
                    return None
        sparsities, names = sorted(points), tuple(points[0.0])
        cells = [[points[sparsity][name] for name in names] for sparsity in sparsities]
        targets = [[target for target, _ in row] for row in cells]
        thresholds = [[rule.threshold if rule else _NO_RULE for _, rule in row] for row in cells]
        return cls(
            projections=names,
            sparsities=torch.tensor(sparsities, dtype=torch.float64),
            targets=torch.tensor(targets, dtype=torch.float64),
            thresholds=torch.tensor(thresholds, dtype=torch.float32),
            vectors={name: kinds for name, kinds in vectors.items() if kinds},
        )

    @property
    def end(self) -> float:
        """The highest sparsity budget of the path."""
        return float(self.sparsities[-1])

    def at(self, sparsity: float) -> Planned:
        """Return target sparsity and rule of every projection at a budget.

        Between two points, targets and thresholds are interpolated linearly, with threshold 0
        for a missing rule.

        Args:
            sparsity: Sparsity budget in [0, 1).

        Raises:
            UserError: The path ends below `sparsity`.
        """
        if sparsity > self.end:
            raise UserError(
                f"The plan's path ends at sparsity {self.end}, {sparsity} was asked for. Ask "
                "for less, or allocate a plan that goes further."
            )
        high = int(torch.searchsorted(self.sparsities, sparsity))
        targets, thresholds = self.targets[high], self.thresholds[high]
        if sparsity != float(self.sparsities[high]):
            begin, end = self.sparsities[high - 1 : high + 1].tolist()
            weight = (sparsity - begin) / (end - begin)
            targets = (1 - weight) * self.targets[high - 1] + weight * targets
            thresholds = _between(self.thresholds[high - 1], thresholds, weight)
        columns = zip(self.projections, targets.tolist(), thresholds.tolist(), strict=True)
        return {name: (target, self._rule(name, threshold)) for name, target, threshold in columns}

    def to_dict(self) -> dict[str, float]:
        """Return a summary in JSON form; the path itself is in `to_tensors`."""
        return {"points": len(self.sparsities), "end": self.end}

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the points as tensors whose names begin with `prefix`."""
        return {f"{prefix}.{kind}": getattr(self, kind) for kind in _TENSORS}

    @classmethod
    def from_tensors(
        cls,
        projections: tuple[str, ...],
        vectors: Mapping[str, Mapping[str, Tensor]],
        tensors: Mapping[str, Tensor],
        prefix: str,
    ) -> "RulePath":
        """Rebuild a path from `to_tensors` and what a plan stores of its projections.

        Args:
            projections: Dotted module names, one per column.
            vectors: Score scale and shift by projection and name.
            tensors: Tensors by name; others than those of the path are ignored.
            prefix: Prefix of the tensor names.

        Raises:
            ValueError: The tensors are not a path of these projections.
        """
        points = {kind: tensors[f"{prefix}.{kind}"] for kind in _TENSORS}
        return cls(projections=projections, vectors=vectors, **points)

    def _rule(self, name: str, threshold: float) -> MaskRule | None:
        if threshold < 0.0:
            return None
        return MaskRule(threshold=threshold, **self.vectors.get(name, {}))


def _between(low: Tensor, high: Tensor, weight: float) -> Tensor:
    # Not torch.lerp, which returns NaN for an infinite threshold.
    mixed = (1 - weight) * low.double().clamp(min=0) + weight * high.double().clamp(min=0)
    return torch.where((low < 0) & (high < 0), _NO_RULE, mixed)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
