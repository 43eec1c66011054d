"""The artifact of calibration: statistics of every projection input of one model on one text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.calibration.allocation_path import AllocationPath
from teal.calibration.histogram import Histogram
from teal.calibration.input_statistics import ChannelMoments, InputStatistics
from teal.foundation.artifact import load_artifact, save_artifact, well_formed
from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.foundation.provenance import TextProvenance
from teal.quantization import FLOAT

SCHEMA_VERSION = 2

# Statistics before this version were all measured with float weights.
_FIRST_WITH_FORMAT = 2
_FINGERPRINTS = "text.fingerprints"


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationStats:
    """Statistics of every distinct projection input of one model.

    Attributes:
        model: The model that was calibrated.
        text: Provenance of the calibration text.
        dtype: Activation dtype, such as "bfloat16".
        inputs: Statistics by input name, such as "model.layers.0.attention_input".
        library_version: Version of teal that measured them.
        weight_format: Format of the weights: "float", "int8", "int4" or "fp8".
        paths: Allocation paths that were computed for this model, by strategy.
    """

    model: ModelIdentity
    text: TextProvenance
    dtype: str
    inputs: dict[str, InputStatistics]
    library_version: str
    weight_format: str = FLOAT
    paths: dict[str, AllocationPath] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for statistics in self.inputs.values():
            for name in statistics.projections:
                shape = self.model.shapes.get(name)
                if shape is None or shape[0] != statistics.in_features:
                    raise UserError(
                        f"The statistics of {name} have {statistics.in_features} channels, the "
                        f"model's shape of it is {shape}. Calibrate anew."
                    )

    def of(self, projection: str) -> InputStatistics:
        """Return the statistics of the input of `projection`.

        Raises:
            UserError: There are none.
        """
        if projection not in self._by_projection:
            raise UserError(
                f"The statistics cover {len(self._by_projection)} projections, not "
                f"{projection!r}. Calibrate the whole model, or plan for those with target modules."
            )
        return self._by_projection[projection]

    def require_format(self, weight_format: str) -> None:
        """Check that a model has the weight format that these statistics were measured with.

        Raises:
            UserError: It has another one.
        """
        if weight_format != self.weight_format:
            wanted = self.weight_format
            cure = "Leave out --quantize" if wanted == FLOAT else f"Give --quantize {wanted}"
            raise UserError(
                f"The statistics were measured with {wanted} weights, the model has "
                f"{weight_format} ones. {cure}, or calibrate anew."
            )

    def merge(self, other: "CalibrationStats") -> "CalibrationStats":
        """Return the statistics of both texts together.

        Histograms equal those of a single pass exactly, moments up to float64 rounding.
        Allocation paths belong to one text and are left out.

        Raises:
            UserError: Model, weight format, inputs or dtype differ.
        """
        self.model.require(other.model, "first calibration")
        self.require_format(other.weight_format)
        if self.inputs.keys() != other.inputs.keys():
            first = min(self.inputs.keys() ^ other.inputs.keys())
            raise UserError(
                f"Only one of the two statistics has {first}. Merge statistics of the same layers."
            )
        return CalibrationStats(
            model=self.model,
            text=_merged_texts(self.text, other.text),
            dtype=self.dtype,
            inputs={name: mine.merge(other.inputs[name]) for name, mine in self.inputs.items()},
            library_version=self.library_version,
            weight_format=self.weight_format,
        )

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write `stats.json` and `stats.safetensors`; histograms keep only their occupied range.

        Args:
            folder: Destination.
            force: Whether to replace an existing folder.

        Raises:
            UserError: The destination exists or cannot be written.
        """
        tensors = {_FINGERPRINTS: self.text.fingerprints}
        for name, statistics in self.inputs.items():
            tensors |= _tensors_of(name, statistics)
        for name, path in self.paths.items():
            tensors |= path.to_tensors(f"paths.{name}")
        save_artifact(Path(folder), "stats", self._payload(), tensors, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> "CalibrationStats":
        """Read statistics that `save` wrote, bit for bit.

        Args:
            folder: Folder of the statistics.

        Raises:
            UserError: The statistics are missing, damaged, or of a newer schema.
        """
        payload, tensors = load_artifact(Path(folder), "stats", SCHEMA_VERSION)
        with well_formed(Path(folder)):
            return cls(
                model=ModelIdentity.from_dict(payload["model"]),
                text=TextProvenance.from_dict(payload["text"], tensors[_FINGERPRINTS]),
                dtype=str(payload["dtype"]),
                inputs={
                    name: _input_from_dict(name, content, tensors)
                    for name, content in payload["inputs"].items()
                },
                library_version=str(payload["library_version"]),
                weight_format=_format_from_dict(payload),
                paths={
                    name: AllocationPath.from_dict(content, tensors, f"paths.{name}")
                    for name, content in payload["paths"].items()
                },
            )

    @cached_property
    def _by_projection(self) -> dict[str, InputStatistics]:
        inputs = self.inputs.values()
        return {name: statistics for statistics in inputs for name in statistics.projections}

    def _payload(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "library_version": self.library_version,
            "dtype": self.dtype,
            "weight_format": self.weight_format,
            "text": self.text.to_dict(),
            "inputs": {name: _dict_of(statistics) for name, statistics in self.inputs.items()},
            "paths": {name: path.to_dict() for name, path in self.paths.items()},
            "model": self.model.to_dict(),
        }


def _format_from_dict(payload: Mapping[str, Any]) -> str:
    is_known = payload["schema_version"] >= _FIRST_WITH_FORMAT
    return str(payload["weight_format"]) if is_known else FLOAT


def _dict_of(statistics: InputStatistics) -> dict[str, Any]:
    return {
        "projections": list(statistics.projections),
        "in_features": statistics.in_features,
        "dtype": statistics.dtype,
        "count": statistics.count,
        "first_bin": statistics.histogram.occupied()[0],
        "has_moments": statistics.moments is not None,
    }


def _tensors_of(name: str, statistics: InputStatistics) -> dict[str, Tensor]:
    tensors = {f"{name}.histogram": statistics.histogram.occupied()[1]}
    if statistics.moments is not None:
        tensors[f"{name}.sum"] = statistics.moments.sum
        tensors[f"{name}.square_sum"] = statistics.moments.square_sum
    return tensors


def _input_from_dict(
    name: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> InputStatistics:
    moments = None
    if content["has_moments"]:
        moments = ChannelMoments(
            sum=tensors[f"{name}.sum"], square_sum=tensors[f"{name}.square_sum"]
        )
    dtype, first_bin = str(content["dtype"]), int(content["first_bin"])
    return InputStatistics(
        projections=tuple(content["projections"]),
        in_features=int(content["in_features"]),
        dtype=dtype,
        histogram=Histogram.from_counts(dtype, first_bin, tensors[f"{name}.histogram"]),
        moments=moments,
        count=int(content["count"]),
    )


def _merged_texts(one: TextProvenance, other: TextProvenance) -> TextProvenance:
    same = (one.source, one.sha256) == (other.source, other.sha256)
    return TextProvenance(
        source=one.source if same else f"{one.source} + {other.source}",
        sha256=one.sha256 if same else None,
        offset=min(one.offset, other.offset) if same else 0,
        num_tokens=one.num_tokens + other.num_tokens,
        sequence_length=max(one.sequence_length, other.sequence_length),
        fingerprints=torch.unique(torch.cat([one.fingerprints, other.fingerprints])),
    )
