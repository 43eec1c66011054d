"""The sparsity plan, an artifact: one mask rule per projection, and how it was decided."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from teal.foundation.artifact import load_artifact, save_artifact, well_formed
from teal.foundation.errors import UserError, check_sparsity
from teal.foundation.identity import ModelIdentity
from teal.foundation.provenance import TextProvenance
from teal.methods import MaskRule
from teal.methods.rule_path import Planned, RulePath
from teal.quantization import FLOAT

SCHEMA_VERSION = 4

# Plans before this version have no path.
_FIRST_WITH_PATH = 2
# Plans before this version were all calibrated with float weights.
_FIRST_WITH_FORMAT = 3
# Plans before this version call the score scale of a rule "scale".
_FIRST_WITH_SCORE_SCALE = 4
_PATH = "path"
_FINGERPRINTS = "calibration.fingerprints"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedProjection:
    """The part of a plan for one projection.

    Attributes:
        target_sparsity: Fraction of the input to drop, as measured on the calibration text.
        rule: Mask rule of the input, or `None` if the projection stays dense.
    """

    target_sparsity: float
    rule: MaskRule | None

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity, "Target sparsity")


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsityPlan:
    """One mask rule per projection, for one model.

    Attributes:
        model: Identity of the model that the plan was made for.
        projections: Target and rule of each planned projection, by dotted module name.
        method: Method that made the rules, such as "teal".
        strategy: Strategy that distributed the sparsity over the projections, such as "uniform".
        target_sparsity: Sparsity budget that was asked for: mean of the projections' targets,
            weighted by weight size.
        calibration: Provenance of the text that the thresholds come from.
        dtype: Activation dtype during calibration, such as "bfloat16".
        library_version: Version of teal that made the plan.
        weight_format: Weight format during calibration: "float", "int8", "int4" or "fp8".
        path: Rules at other sparsities, for `at`, or `None` if they are not known.
    """

    model: ModelIdentity
    projections: Mapping[str, PlannedProjection]
    method: str
    strategy: str
    target_sparsity: float
    calibration: TextProvenance
    dtype: str
    library_version: str
    weight_format: str = FLOAT
    path: RulePath | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity, "Target sparsity")
        unknown = [name for name in self.projections if name not in self.model.shapes]
        if unknown:
            raise UserError(
                f"The plan names {unknown[0]!r}, which its model does not have. Make it anew."
            )
        if self.path and self.path.projections != tuple(self.projections):
            raise UserError("The plan's path is that of other projections. Make the plan anew.")
        for name in self.projections:
            self._check_vectors(name)

    @property
    def sparsity_budget(self) -> float:
        """Mean target sparsity over the planned projections, weighted by weight size."""
        return self.model.mean_sparsity(
            {name: projection.target_sparsity for name, projection in self.projections.items()}
        )

    def at(self, sparsity: float) -> "SparsityPlan":
        """Return the plan at another sparsity, without the statistics.

        At 0 the plan has no rules; at the plan's own target it is the plan itself. Any other
        sparsity is read off the path, with targets and thresholds interpolated between its points.

        Args:
            sparsity: Sparsity budget in [0, 1).

        Raises:
            UserError: The sparsity is out of range or above the end of the path, or there is no
                path.
        """
        sparsity = check_sparsity(sparsity)
        if sparsity == 0.0:
            planned: Planned = dict.fromkeys(self.projections, (0.0, None))
        elif sparsity == self.target_sparsity:
            return self
        elif self.path:
            planned = self.path.at(sparsity)
        else:
            raise UserError(
                f"The plan holds no path, only the rules of sparsity {self.target_sparsity}; "
                f"{sparsity} was asked for. Allocate a plan at that sparsity."
            )
        return replace(
            self,
            target_sparsity=sparsity,
            projections={
                name: PlannedProjection(target_sparsity=target, rule=rule)
                for name, (target, rule) in planned.items()
            },
        )

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the plan to `plan.json`, and its tensors to `plan.safetensors`.

        Args:
            folder: Destination.
            force: Whether to replace an existing folder.

        Raises:
            UserError: The destination exists or cannot be written.
        """
        tensors = {
            f"{name}.{kind}": vector
            for name in self.projections
            for kind, vector in self._vectors_of(name).items()
        }
        if self.path:
            tensors |= self.path.to_tensors(_PATH)
        tensors[_FINGERPRINTS] = self.calibration.fingerprints
        save_artifact(Path(folder), "plan", self._payload(), tensors, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> "SparsityPlan":
        """Read a plan that `save` wrote, bit for bit.

        Args:
            folder: Folder of the plan.

        Raises:
            UserError: The plan is missing, damaged, or of a newer schema.
        """
        payload, tensors = load_artifact(Path(folder), "plan", SCHEMA_VERSION)
        with well_formed(Path(folder)):
            vectors = {
                name: {
                    _vector_name(kind, payload): tensors[f"{name}.{kind}"]
                    for kind in content["vectors"]
                }
                for name, content in payload["projections"].items()
            }
            return cls(
                model=ModelIdentity.from_dict(payload["model"]),
                projections={
                    name: _planned_from_dict(content, vectors[name])
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
                weight_format=_format_from_dict(payload),
                path=_path_from_dict(payload, vectors, tensors),
            )

    def _vectors_of(self, name: str) -> Mapping[str, Tensor]:
        """Return score scale and shift, also of a projection that has a rule only on the path."""
        rule = self.projections[name].rule
        if rule:
            return rule.vectors
        return self.path.vectors.get(name, {}) if self.path else {}

    def _check_vectors(self, name: str) -> None:
        for kind, vector in self._vectors_of(name).items():
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
            "path": self.path.to_dict() if self.path else None,
            "dtype": self.dtype,
            "weight_format": self.weight_format,
            "calibration": self.calibration.to_dict(),
            "projections": {
                name: {
                    "target_sparsity": projection.target_sparsity,
                    "threshold": projection.rule.threshold if projection.rule else None,
                    "vectors": sorted(self._vectors_of(name)),
                    "weight_size": self.model.weight_size(name),
                }
                for name, projection in self.projections.items()
            },
            "model": self.model.to_dict(),
        }


def _planned_from_dict(
    content: Mapping[str, Any], vectors: Mapping[str, Tensor]
) -> PlannedProjection:
    rule = None
    if content["threshold"] is not None:
        rule = MaskRule(threshold=float(content["threshold"]), **vectors)
    return PlannedProjection(target_sparsity=float(content["target_sparsity"]), rule=rule)


def _vector_name(kind: str, payload: Mapping[str, Any]) -> str:
    is_old = payload["schema_version"] < _FIRST_WITH_SCORE_SCALE
    return "score_scale" if is_old and kind == "scale" else kind


def _format_from_dict(payload: Mapping[str, Any]) -> str:
    is_known = payload["schema_version"] >= _FIRST_WITH_FORMAT
    return str(payload["weight_format"]) if is_known else FLOAT


def _path_from_dict(
    payload: Mapping[str, Any],
    vectors: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Tensor],
) -> RulePath | None:
    if payload["schema_version"] < _FIRST_WITH_PATH or payload["path"] is None:
        return None
    return RulePath.from_tensors(tuple(payload["projections"]), vectors, tensors, _PATH)
