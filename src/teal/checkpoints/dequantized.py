"""A quantized checkpoint as a Hugging Face model that computes with the values of its codes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from teal.checkpoints.quantized import HEAD, QuantizedCheckpoint
from teal.foundation.errors import UserError

_GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class DequantizedModel:
    """A Hugging Face model with the values of a checkpoint's codes.

    Attributes:
        model: The model.
        weight_format: Format of the projections' codes, such as "int4"; joined with "+" where they
            differ.
        missing: Names of parameters that the checkpoint lacks.
    """

    model: Any
    weight_format: str
    missing: frozenset[str]


def open_dequantized(folder: Path, config: Any, dtype: torch.dtype | None) -> DequantizedModel:
    """Open a checkpoint of `teal quantize`, AWQ, GPTQ or compressed-tensors.

    Args:
        folder: The model folder.
        config: Its configuration; loses its `quantization_config`.
        dtype: Of the model, or `None` for the checkpoint's own.

    Raises:
        UserError: The checkpoint is of an unsupported kind, damaged, or adds a bias that the model
            does not have.
    """
    checkpoint = QuantizedCheckpoint(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    state, formats = _others(checkpoint, dtype), set()
    for name, weight in checkpoint:
        state[f"{name}.weight"] = weight.dequantize(dtype).T.contiguous()
        if name != HEAD:
            formats.add(weight.format)
    del config.quantization_config
    if HEAD in checkpoint.names:
        # A head that is quantized no longer is the embedding.
        config.tie_word_embeddings = False
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    for name in report["unexpected_keys"]:
        # GPTQ writes a bias where a model has none, which then has to be zero.
        if name.endswith(".bias") and bool(state[name].any()):
            raise UserError(
                f"{str(folder)!r} holds {name}, which the model does not have. Use a checkpoint "
                "that belongs to its config.json."
            )
    if (folder / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return DequantizedModel(
        model=model,
        weight_format="+".join(sorted(formats)),
        missing=frozenset(report["missing_keys"]),
    )


def _others(checkpoint: QuantizedCheckpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read what is not part of a quantized projection, and the biases of those."""
    prefixes = tuple(f"{name}." for name in checkpoint.names)
    state = {}
    for file in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                if name.endswith(".bias") or not name.startswith(prefixes):
                    state[name] = tensors.get_tensor(name).to(dtype)
    return state
