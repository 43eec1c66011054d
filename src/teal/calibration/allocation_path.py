"""The record of a greedy allocation, round by round, so one run serves every target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocationPath:
    """Sparsities of the projections of every block after each round, starting dense.

    Attributes:
        settings: Settings and inputs of the search, such as step and text, in JSON form.
        sparsities: Sparsity after each round by full projection name, (rounds,), float64.
        errors: Error of the block output after each round by block name, (rounds,), float64.
    """

    settings: Mapping[str, Any]
    sparsities: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form; `to_tensors` returns the rest."""
        return {
            "settings": dict(self.settings),
            "projections": list(self.sparsities),
            "blocks": list(self.errors),
        }

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return sparsities and errors as tensors whose names begin with `prefix`."""
        sparsities = {f"{prefix}.sparsities.{name}": t for name, t in self.sparsities.items()}
        errors = {f"{prefix}.errors.{name}": t for name, t in self.errors.items()}
        return sparsities | errors

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
    ) -> "AllocationPath":
        """Rebuild a path from `to_dict` and `to_tensors`.

        Args:
            content: JSON form.
            tensors: Tensors by name; others than those of the path are ignored.
            prefix: Prefix of the tensor names.
        """
        return cls(
            settings=dict(content["settings"]),
            sparsities={
                name: tensors[f"{prefix}.sparsities.{name}"] for name in content["projections"]
            },
            errors={name: tensors[f"{prefix}.errors.{name}"] for name in content["blocks"]},
        )
