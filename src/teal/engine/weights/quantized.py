"""Weights of few bits for the engine: rounded while it opens a model, or read from a checkpoint."""

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

# With scales of 16 bits in groups of 32, the smallest; int8 and fp8 have few scales.
_BYTES = {"fp8": 1.0, "int4": 0.5 + 2 / 32, "int8": 1.0}
_NO_NUMBER = 0x7F


class RoundedSource:
    """Another source whose matrices are rounded to the nearest values as they pass.

    Args:
        source: Where dense weights come from.
        scheme: Into what they are quantized.
    """

    def __init__(self, source: Source, scheme: Scheme) -> None:
        self._scheme = scheme
        self._source = source
        self.vector = source.vector
        self.rows = source.rows

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Matrix:
        """Return projections beside each other; see `Source`."""
        dense = self._source.matrix(output_sizes, in_features)
        assert isinstance(dense, Tensor)
        return round_to_nearest(dense, self._scheme)


class CheckpointSource:
    """A folder with quantized projections.

    Args:
        dense: What reads everything else in it, and projections that are not quantized.
        checkpoint: What reads those that are.
        device: Where to put them.
        names: All tensors of the folder.
        read: Those that were read; added to.
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
        """Return projections beside each other; see `Source`.

        Raises:
            UserError: Only some of them are quantized, or in different ways; or they are damaged.
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
            if bool(((octets & _NO_NUMBER) == _NO_NUMBER).any()):
                raise UserError(f"{name} holds NaN. Use an undamaged checkpoint.")
        self._mark_read(name, weight.out_features)
        return weight.to(self._device)

    def _mark_read(self, name: str, out_features: int) -> None:
        prefix, bias = f"{name}.", f"{name}.bias"
        self._read.update(tensor for tensor in self._names if tensor.startswith(prefix))
        # GPTQ writes a bias where a model has none, which then has to be zero.
        if bias in self._names and bool(self._dense.vector({bias: out_features}).any()):
            self._read.discard(bias)


def quantized_head(weights: DecoderWeights) -> DecoderWeights:
    """Return the same weights with the head in int8; a tied embedding stays as it is.

    A head that a checkpoint quantizes already stays as it is.
    """
    if not isinstance(weights.head, Tensor):
        return weights
    head = round_to_nearest(weights.head.t().contiguous(), Scheme(format="int8"))
    return replace(weights, head=head)


def bytes_needed(architecture: Architecture, dtype: torch.dtype, scheme: Scheme | None) -> int:
    """Return about how many bytes the weights of a decoder take.

    Args:
        architecture: What weights there are.
        dtype: Of those that are floats.
        scheme: Into what the projections are quantized.
    """
    if scheme is None:
        return architecture.num_weights * dtype.itemsize
    identity = architecture.identity
    projections = sum(map(identity.weight_size, identity.shapes))
    rest = architecture.num_weights - projections
    return int(projections * _BYTES[scheme.format]) + rest * dtype.itemsize
