"""What a decode step reads: of what the weights are made, and how many bytes of them are kept."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from teal.engine.weights.decoder_weights import DecoderWeights
from teal.engine.weights.matrix import Matrix, bytes_of, format_of, weight_rows
from teal.quantization import FLOAT


@dataclass(frozen=True, kw_only=True)
class WeightsRead:
    """Of what the weights are made that a token reads.

    Attributes:
        format: Of the projections: "float", "int8", "int4" or "fp8".
        group_size: Inputs that share a scale; `None` where all do, or projections differ in it.
        head_format: Of the head.
    """

    format: str = FLOAT
    group_size: int | None = None
    head_format: str = FLOAT

    @classmethod
    def of(cls, weights: DecoderWeights) -> "WeightsRead":
        """Look at the weights of a decoder."""
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
        sparsities: Sparsity by projection; what is not named is dense.
    """
    kept = sum(width * (1.0 - sparsities.get(name, 0.0)) for name, width in output_sizes.items())
    skippable = weight_rows(matrix).nbytes
    return skippable * kept / sum(output_sizes.values()) + bytes_of(matrix) - skippable
