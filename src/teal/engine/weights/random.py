"""Draws the weights of a decoder at random, for measuring speed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from teal.engine.weights.decoder_weights import DecoderWeights, assemble
from teal.engine.weights.memory import require_memory
from teal.engine.weights.quantized import RoundedSource, bytes_needed
from teal.foundation.progress import Progress, silent
from teal.models.architectures import Architecture
from teal.quantization import Scheme


@torch.no_grad()
def random_weights(
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    scheme: Scheme | None = None,
    progress: Progress = silent,
) -> DecoderWeights:
    """Draw weights that preserve the scale of the hidden states.

    They are drawn in place, so peak memory is that of the weights.

    Args:
        architecture: Architecture of the model.
        dtype: Dtype of the weights.
        device: Device of the weights.
        seed: Equal seeds give equal weights on the same kind of device.
        scheme: Format to which projections are quantized, one after the other.
        progress: Shows progress over the layers.

    Raises:
        UserError: The weights are too large for the device.
    """
    require_memory(bytes_needed(architecture, dtype, scheme), device, "The weights")
    drawn = _RandomSource(architecture, dtype, device, seed)
    source = drawn if scheme is None else RoundedSource(drawn, scheme)
    return assemble(architecture, source, tied_head=architecture.tied_head, progress=progress)


class _RandomSource:
    def __init__(
        self, architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self._norm_weight = 1.0 - architecture.form.norm_offset
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Tensor:
        return self._normal((in_features, sum(output_sizes.values())), in_features**-0.5)

    def vector(self, output_sizes: Mapping[str, int]) -> Tensor:
        value = 0.0 if next(iter(output_sizes)).endswith(".bias") else self._norm_weight
        return torch.full(
            (sum(output_sizes.values()),), value, dtype=self._dtype, device=self._device
        )

    def rows(self, name: str, shape: tuple[int, int]) -> Tensor:
        del name
        return self._normal(shape, shape[1] ** -0.5)

    def _normal(self, shape: tuple[int, int], deviation: float) -> Tensor:
        empty = torch.empty(shape, dtype=self._dtype, device=self._device)
        return empty.normal_(0.0, deviation, generator=self._generator)
