"""Rotary position embeddings: their frequencies and their tables of cosines and sines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from teal.foundation.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding.

    Attributes:
        frequencies: Angle per position of each pair of channels, (rotary_dim / 2,), float32 values.
        scaling: Factor on cosines and sines, as used by YaRN.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the first `length` positions.

        Args:
            length: Number of positions.
            device: Device of the tables.

        Returns:
            Cosines and sines, (length, rotary_dim / 2) each, float32.
        """
        positions = torch.arange(length, dtype=torch.float32, device=device)
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def ropes_of(config: Any, layer_types: tuple[str, ...]) -> tuple[Rope, ...]:
    """Return the rotary embedding of every layer.

    Args:
        config: Hugging Face configuration.
        layer_types: Kind of each layer, such as "full_attention".

    Returns:
        One rotary embedding per layer.

    Raises:
        UserError: The type of the rotary embedding is not one of `ROPE_TYPES`.
    """
    config.standardize_rope_params()
    parameters = config.rope_parameters
    # Gemma 3 has one set of parameters per kind of layer, other families a single set.
    if "rope_type" in parameters:
        return (_rope(config, parameters, None),) * len(layer_types)
    by_type = {kind: _rope(config, parameters[kind], kind) for kind in set(layer_types)}
    return tuple(by_type[kind] for kind in layer_types)


def _rope(config: Any, parameters: Mapping[str, Any], layer_type: str | None) -> Rope:
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"The rotary embedding of this model is {rope_type!r}, which the engine does not "
            f"compute. Supported: {', '.join(ROPE_TYPES)}. Run the model with transformers."
        )
    if rope_type == "default":
        return Rope(frequencies=_default_frequencies(config, parameters))
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, layer_type=layer_type)
    return Rope(frequencies=tuple(frequencies.tolist()), scaling=float(scaling))


def _default_frequencies(config: Any, parameters: Mapping[str, Any]) -> tuple[float, ...]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies: list[float] = (1.0 / parameters["rope_theta"] ** exponents).tolist()
    return tuple(frequencies)
