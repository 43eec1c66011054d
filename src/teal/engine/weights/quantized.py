"""Quantized weights for the engine: rounded while a model is opened, or read from a checkpoint."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from teal.checkpoints.quantized import QuantizedCheckpoint
from teal.engine.weights.decoder_weights import DecoderWeights, Source, require_shape
from teal.engine.weights.matrix import Matrix
from teal.foundation.errors import UserError
from teal.models.architectures import Architecture
from teal.quantization import (
    QuantizedWeight,
    Scheme,
    round_to_nearest,
    side_by_side,
)

# Bytes per weight. int4 includes 16-bit scales of the smallest groups, 32; others have few scales.
_BYTES = {"fp8": 1.0, "int4": 0.5 + 2 / 32, "int8": 1.0}
_FP8_NAN = 0x7F


class RoundedSource:
    """Rounds the matrices of another source to nearest.

    Args:
        source: Supplies the float weights.
        scheme: Format to which matrices are quantized.
    """

    def __init__(self, source: Source, scheme: Scheme) -> None:
        self._scheme = scheme
        self._source = source
        self.vector = source.vector
        self.rows = source.rows

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Matrix:
        """Return projections side by side; see `Source`."""
        dense = self._source.matrix(output_sizes, in_features)
        assert isinstance(dense, Tensor)
        return round_to_nearest(dense, self._scheme)


class CheckpointSource:
    """Supplies the weights of a folder with quantized projections.

    Args:
        dense: Reads all tensors that are not quantized.
        checkpoint: Reads quantized projections.
        device: Device of the weights.
        names: Names of all tensors in the folder.
        read: Names of the tensors read so far; updated in place.
    """

    def __init__(
        self,
        dense: Source,
        checkpoint: QuantizedCheckpoint,
        device: torch.device,
        names: set[str],
        read: set[str],
    ) -> None:
        self._dense = dense
        self._checkpoint = checkpoint
        self._device = device
        self._names = names
        self._read = read
        self.vector = dense.vector

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Matrix:
        """Return projections side by side; see `Source`.

        Raises:
            UserError: Only some of them are quantized, their schemes differ, or they are damaged.
        """
        quantized = {name.removesuffix(".weight"): width for name, width in output_sizes.items()}
        found = [name for name in quantized if name in self._checkpoint.names]
        if not found:
            return self._dense.matrix(output_sizes, in_features)
        if len(found) < len(quantized):
            raise UserError(
                f"Of {', '.join(quantized)}, which share an input, only {', '.join(found)} "
                "are quantized. Use a checkpoint that quantizes all of them or none."
            )
        weights = [self._load(name, (in_features, width)) for name, width in quantized.items()]
        return side_by_side(weights).to(self._device) if len(weights) > 1 else weights[0]

    def rows(self, name: str, shape: tuple[int, int]) -> Matrix:
        """Return the embedding, or a head, which may be quantized; see `Source`."""
        own = name.removesuffix(".weight")
        if own not in self._checkpoint.names:
            return self._dense.rows(name, shape)
        return self._load(own, (shape[1], shape[0]))

    def _load(self, name: str, shape: tuple[int, int]) -> QuantizedWeight:
        weight = self._checkpoint.read(name)
        require_shape(name, weight.codes.new_empty(weight.shape, device="meta"), shape)
        if weight.format == "fp8":
            octets = weight.codes.view(torch.uint8)
            if bool(((octets & _FP8_NAN) == _FP8_NAN).any()):
                raise UserError(f"{name} holds NaN. Use an undamaged checkpoint.")
        self._mark_read(name, weight.out_features)
        return weight.to(self._device)

    def _mark_read(self, name: str, out_features: int) -> None:
        prefix, bias = f"{name}.", f"{name}.bias"
        self._read.update(tensor for tensor in self._names if tensor.startswith(prefix))
        # GPTQ writes a bias even if the model has none; it has to be zero then.
        if bias in self._names and bool(self._dense.vector({bias: out_features}).any()):
            self._read.discard(bias)


def quantized_head(weights: DecoderWeights) -> DecoderWeights:
    """Return the same weights with the LM head in int8; a tied embedding keeps its floats.

    A head that is quantized already is left alone.
    """
    if not isinstance(weights.head, Tensor):
        return weights
    head = round_to_nearest(weights.head.t().contiguous(), Scheme(format="int8"))
    return replace(weights, head=head)


def bytes_needed(architecture: Architecture, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """Return the approximate size of the weights of a decoder in bytes.

    Args:
        architecture: Architecture of the model.
        dtype: Dtype of weights that are not quantized.
        scheme: Format of the projections; `None` for floats.
    """
    if scheme is None:
        return architecture.num_weights * dtype.itemsize
    identity = architecture.identity
    projections = sum(map(identity.weight_size, identity.shapes))
    rest = architecture.num_weights - projections
    return int(projections * _BYTES[scheme.format]) + rest * dtype.itemsize
