"""What a decode step reads from memory: weight formats and bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.engine.weights.decoder_weights import DecoderWeights
from teal.engine.weights.matrix import Matrix, bytes_of, format_of, weight_rows
from teal.models.architectures import Architecture
from teal.quantization import FLOAT


@dataclass(frozen=True, kw_only=True)
class WeightsRead:
    """Formats of the weights that a token reads.

    Attributes:
        format: Format of the projections: "float", "int8", "int4" or "fp8".
        group_size: Input channels per scale; `None` if one scale covers all or projections differ.
        head_format: Format of the head.
    """

    format: str = FLOAT
    group_size: int | None = None
    head_format: str = FLOAT

    @classmethod
    def of(cls, weights: DecoderWeights) -> "WeightsRead":
        """Return the formats of a decoder's weights."""
        group_sizes = {
            matrix.group_size
            for layer in weights.layers
            for matrix in layer.matrices
            if not isinstance(matrix, Tensor) and matrix.group_size < matrix.in_features
        }
        return cls(
            format=weights.format,
            group_size=group_sizes.pop() if len(group_sizes) == 1 else None,
            head_format=format_of(weights.head),
        )

    def __str__(self) -> str:
        groups = f", groups of {self.group_size}" if self.group_size else ""
        head = "" if self.head_format == FLOAT else f", {self.head_format} head"
        return f"{self.format}{groups}{head}"


def bytes_kept(
    matrix: Matrix, output_sizes: Mapping[str, int], sparsities: Mapping[str, float]
) -> float:
    """Return the bytes of a matrix that a token reads: kept weight rows, and all scales and zeros.

    Args:
        matrix: Projections beside each other.
        output_sizes: out_features by projection.
        sparsities: Sparsity by projection; projections that are not named are dense.
    """
    kept = sum(size * (1.0 - sparsities.get(name, 0.0)) for name, size in output_sizes.items())
    skippable = weight_rows(matrix).nbytes
    return skippable * kept / sum(output_sizes.values()) + bytes_of(matrix) - skippable


def bytes_of_weights_kept(
    architecture: Architecture, weights: DecoderWeights, sparsities: Mapping[str, float]
) -> float:
    """Return the bytes of weights that a token reads: kept parts of projections, and the head.

    Args:
        architecture: Architecture of the model.
        weights: Weights of the model.
        sparsities: Sparsity by projection; projections that are not named are dense.
    """
    kept = sum(
        bytes_kept(matrix, entry.output_sizes, sparsities)
        for index, layer in enumerate(weights.layers)
        for matrix, entry in zip(layer.matrices, architecture.inputs(index), strict=True)
    )
    return kept + bytes_of(weights.head)


def bytes_of_float_weights(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return the bytes of projections and head if none is quantized and none is skipped."""
    identity = architecture.identity
    projections = sum(map(identity.weight_size, identity.shapes))
    head = architecture.vocab_size * architecture.hidden_size
    return (projections + head) * dtype.itemsize


def bytes_of_cache_read(architecture: Architecture, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values that the token at position `length` reads."""
    tokens = sum(min(length, window or length) for window in architecture.windows)
    return 2 * architecture.kv_size * tokens * dtype.itemsize
