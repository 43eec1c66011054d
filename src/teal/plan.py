"""The artifact between offline and runtime: one mask rule per projection and how it was decided."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from teal.foundation.artifact import load_artifact, save_artifact, well_formed
from teal.foundation.errors import UserError, check_sparsity
from teal.foundation.identity import ModelIdentity
from teal.foundation.provenance import TextProvenance
from teal.methods import MaskRule

SCHEMA_VERSION = 1

_FINGERPRINTS = "calibration.fingerprints"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedProjection:
    """What happens to the input of one projection.

    Attributes:
        target_sparsity: Fraction of the input that calibration expects to be dropped.
        rule: What is dropped, or `None` where the projection stays dense.
    """

    target_sparsity: float
    rule: MaskRule | None

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity, "Target sparsity")


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsityPlan:
    """One mask rule per projection, for one model.

    Attributes:
        model: The model it was made for.
        projections: What happens to each planned projection, by dotted module name.
        method: Name of the published rule, such as "teal".
        strategy: How the sparsity was spread over the projections, such as "uniform".
        target_sparsity: Sparsity budget that was asked for: the mean of the projections' targets
            weighted by weight size.
        calibration: The text that the thresholds come from.
        dtype: Activation dtype during calibration, such as "bfloat16".
        library_version: Version of teal that made the plan.
    """

    model: ModelIdentity
    projections: Mapping[str, PlannedProjection]
    method: str
    strategy: str
    target_sparsity: float
    calibration: TextProvenance
    dtype: str
    library_version: str

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity, "Target sparsity")
        unknown = [name for name in self.projections if name not in self.model.shapes]
        if unknown:
            raise UserError(
                f"The plan names {unknown[0]!r}, which its model does not have. Make it anew."
            )
        for name, projection in self.projections.items():
            self._check_vectors(name, projection.rule)

    @property
    def sparsity_budget(self) -> float:
        """Mean target sparsity over the planned projections, weighted by weight size."""
        return self.model.mean_sparsity(
            {name: projection.target_sparsity for name, projection in self.projections.items()}
        )

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the plan: `plan.json`, and `plan.safetensors` for everything that is a vector.

        Args:
            folder: Destination.
            force: Replace an existing folder.

        Raises:
            UserError: The destination exists or cannot be written.
        """
        tensors = {
            f"{name}.{kind}": vector
            for name, projection in self.projections.items()
            for kind, vector in (projection.rule.vectors if projection.rule else {}).items()
        }
        tensors[_FINGERPRINTS] = self.calibration.fingerprints
        save_artifact(Path(folder), "plan", self._payload(), tensors, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> "SparsityPlan":
        """Read a plan that `save` wrote, bit for bit.

        Args:
            folder: The plan.

        Raises:
            UserError: There is none, it is damaged, or of a newer schema.
        """
        payload, tensors = load_artifact(Path(folder), "plan", SCHEMA_VERSION)
        with well_formed(Path(folder)):
            return cls(
                model=ModelIdentity.from_dict(payload["model"]),
                projections={
                    name: _planned_from_dict(name, content, tensors)
                    for name, content in payload["projections"].items()
                },
                method=str(payload["method"]),
                strategy=str(payload["strategy"]),
                target_sparsity=float(payload["target_sparsity"]),
                calibration=TextProvenance.from_dict(
                    payload["calibration"], tensors[_FINGERPRINTS]
                ),
                dtype=str(payload["dtype"]),
                library_version=str(payload["library_version"]),
            )

    def _check_vectors(self, name: str, rule: MaskRule | None) -> None:
        for kind, vector in (rule.vectors if rule else {}).items():
            expected = (self.model.shapes[name][0],)
            if tuple(vector.shape) != expected:
                raise UserError(
                    f"The {kind} of {name} has shape {tuple(vector.shape)}, its input {expected}. "
                    "Make the plan anew."
                )

    def _payload(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "library_version": self.library_version,
            "method": self.method,
            "strategy": self.strategy,
            "target_sparsity": self.target_sparsity,
            "dtype": self.dtype,
            "calibration": self.calibration.to_dict(),
            "projections": {
                name: {
                    "target_sparsity": projection.target_sparsity,
                    "threshold": projection.rule.threshold if projection.rule else None,
                    "vectors": sorted(projection.rule.vectors) if projection.rule else [],
                    "weight_size": self.model.weight_size(name),
                }
                for name, projection in self.projections.items()
            },
            "model": self.model.to_dict(),
        }


def _planned_from_dict(
    name: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> PlannedProjection:
    rule = None
    if content["threshold"] is not None:
        vectors = {kind: tensors[f"{name}.{kind}"] for kind in content["vectors"]}
        rule = MaskRule(threshold=float(content["threshold"]), **vectors)
    return PlannedProjection(target_sparsity=float(content["target_sparsity"]), rule=rule)
