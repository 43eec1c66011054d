"""The record of a greedy allocation, step by step, so that one run serves every target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocationPath:
    """Sparsities of the projections of every block, step by step from dense upwards.

    Attributes:
        settings: What it was made with: step, tokens, text and the like, as JSON.
        sparsities: Sparsity after each step by full projection name, (steps,), float64.
        errors: Error of the block output after each step by block name, (steps,), float64.
    """

    settings: Mapping[str, Any]
    sparsities: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form; the steps travel as tensors beside it."""
        return {
            "settings": dict(self.settings),
            "projections": list(self.sparsities),
            "blocks": list(self.errors),
        }

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the steps, each tensor's name beginning with `prefix`."""
        sparsities = {f"{prefix}.sparsities.{name}": t for name, t in self.sparsities.items()}
        errors = {f"{prefix}.errors.{name}": t for name, t in self.errors.items()}
        return sparsities | errors

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
    ) -> "AllocationPath":
        """Rebuild from `to_dict` and `to_tensors`."""
        return cls(
            settings=dict(content["settings"]),
            sparsities={
                name: tensors[f"{prefix}.sparsities.{name}"] for name in content["projections"]
            },
            errors={name: tensors[f"{prefix}.errors.{name}"] for name in content["blocks"]},
        )
