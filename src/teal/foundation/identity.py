"""The identity of a model: its type and the shapes of its projections."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teal.foundation.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The properties that a model, its statistics and its plans must have in common.

    Attributes:
        model_type: Hugging Face model type, such as "llama".
        shapes: (in_features, out_features) of every projection, by dotted module name in the order
            of the forward pass.
    """

    model_type: str
    shapes: Mapping[str, tuple[int, int]]

    def weight_size(self, name: str) -> int:
        """Return the number of weights of the projection `name`."""
        in_features, out_features = self.shapes[name]
        return in_features * out_features

    def mean_sparsity(self, sparsities: Mapping[str, float]) -> float:
        """Return the mean over the given projections, weighted by weight size.

        Args:
            sparsities: Sparsity by projection; projections left out do not count.

        Returns:
            The mean, which is the sparsity budget if these are targets; 0 for an empty mapping.
        """
        total = sum(self.weight_size(name) for name in sparsities)
        dropped = sum(self.weight_size(name) * s for name, s in sparsities.items())
        return dropped / total if total else 0.0

    def require(self, other: "ModelIdentity", what: str) -> None:
        """Check that a model has this identity.

        Args:
            other: Identity of the model.
            what: Artifact that has this identity, such as "plan", for the message.

        Raises:
            UserError: The identities differ; the message names the first mismatch.
        """
        mismatch = self._first_mismatch(other)
        if mismatch:
            raise UserError(
                f"The {what} belongs to another model: {mismatch}. "
                f"Use the model it was made with, or calibrate this one."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return {
            "model_type": self.model_type,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ModelIdentity":
        """Rebuild an identity from `to_dict`."""
        shapes = {str(name): (int(i), int(o)) for name, (i, o) in content["shapes"].items()}
        return cls(model_type=str(content["model_type"]), shapes=shapes)

    def _first_mismatch(self, other: "ModelIdentity") -> str | None:
        if self.model_type != other.model_type:
            return f"model type {self.model_type!r} here, {other.model_type!r} in the model"
        for name in [*self.shapes, *other.shapes]:
            mine, theirs = self.shapes.get(name), other.shapes.get(name)
            if mine != theirs:
                return f"{name} is {_show(mine)} here, {_show(theirs)} in the model"
        return None


def _show(shape: tuple[int, int] | None) -> str:
    return "absent" if shape is None else f"{shape[0]}→{shape[1]}"
