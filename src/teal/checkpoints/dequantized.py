"""Opening a quantized checkpoint as a Hugging Face model with dequantized weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from teal.checkpoints.quantized import HEAD, QuantizedCheckpoint
from teal.foundation.errors import UserError

_GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class DequantizedModel:
    """A Hugging Face model with the dequantized weights of a checkpoint.

    Attributes:
        model: The model, on the CPU.
        weight_format: Format of the quantized projections, such as "int4"; several formats are
            joined with "+".
        missing: Names of the parameters that the checkpoint lacks.
    """

    model: Any
    weight_format: str
    missing: frozenset[str]


def open_dequantized(folder: Path, config: Any, dtype: torch.dtype | None) -> DequantizedModel:
    """Open a checkpoint written by `teal quantize`, AWQ, GPTQ or compressed-tensors.

    Args:
        folder: The model folder.
        config: Hugging Face configuration of the model; its `quantization_config` is removed.
        dtype: Dtype of the model, or `None` for the checkpoint's own.

    Raises:
        UserError: The checkpoint is damaged, quantized in an unsupported way, or holds a bias that
            the model does not have.
    """
    checkpoint = QuantizedCheckpoint(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    state, formats = _unquantized(checkpoint, dtype), set()
    for name, weight in checkpoint:
        state[f"{name}.weight"] = weight.dequantize(dtype).T.contiguous()
        if name != HEAD:
            formats.add(weight.format)
    del config.quantization_config
    if HEAD in checkpoint.names:
        # A quantized head is no longer tied to the embedding.
        config.tie_word_embeddings = False
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    for name in report["unexpected_keys"]:
        # GPTQ writes a bias even where a model has none; it must then be zero.
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


def _unquantized(checkpoint: QuantizedCheckpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read all tensors outside the quantized projections, and the biases inside them."""
    prefixes = tuple(f"{name}." for name in checkpoint.names)
    return {
        name: checkpoint.files.tensor(name).to(dtype)
        for name in sorted(checkpoint.files.names)
        if name.endswith(".bias") or not name.startswith(prefixes)
    }
