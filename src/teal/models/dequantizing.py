"""A quantized checkpoint as a Hugging Face model that computes with the values of its codes."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from teal.foundation.errors import UserError
from teal.models.weight_format import mark_weight_format
from teal.quantization import QuantizedCheckpoint
from teal.quantization.checkpoint import HEAD

_GENERATION = "generation_config.json"


def open_dequantized(folder: Path, config: Any, dtype: torch.dtype | None) -> tuple[Any, set[str]]:
    """Open a checkpoint of `teal quantize`, AWQ, GPTQ or compressed-tensors.

    Args:
        folder: The model folder.
        config: Its configuration; loses its `quantization_config`.
        dtype: Of the model, or `None` for the checkpoint's own.

    Returns:
        The model, and the names of parameters that the checkpoint lacks.

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
    mark_weight_format(model, "+".join(sorted(formats)))
    return model, set(report["missing_keys"])


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
