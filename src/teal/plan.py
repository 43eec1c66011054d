"""The artifact between offline and runtime: one mask rule per projection and how it was decided."""

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
        weight_format: Of the weights during calibration: "float", "int8", "int4" or "fp8".
        path: The rules at other sparsities, for `at`, or `None` where they are not known.
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
        """Return the plan at another sparsity, without going back to the statistics.

        0 gives a plan without rules, the plan's own target the plan as it is. Any other is read
        off the path, between whose points targets and thresholds are interpolated.

        Args:
            sparsity: Sparsity budget in [0, 1).

        Raises:
            UserError: It is no such fraction, the path ends below it, or there is no path.
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
        """Write the plan: `plan.json`, and `plan.safetensors` for everything that is a vector.

        Args:
            folder: Destination.
            force: Replace an existing folder.

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
            folder: The plan.

        Raises:
            UserError: There is none, it is damaged, or of a newer schema.
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
        """Return score_scale and shift also of a projection that only the path gives a rule."""
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
