"""Opening a model and its tokenizer, with errors that say what is wrong."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from teal.checkpoints.dequantized import open_dequantized
from teal.checkpoints.location import NO_CODE, check_source, folder_of, load_config, unreadable
from teal.foundation.errors import UserError
from teal.models.families import family_named
from teal.models.placement import resolve_device, resolve_dtype
from teal.models.weight_format import mark_weight_format


def load_model(source: str, *, dtype: str = "auto", device: str = "auto") -> Any:
    """Open a Hugging Face causal language model of a supported family for inference.

    The weights of a quantized checkpoint are dequantized.

    Args:
        source: Model folder, or a name on the Hugging Face hub.
        dtype: "auto", "float32", "bfloat16" or "float16"; "auto" is the checkpoint's own.
        device: "auto", "cpu" or "cuda"; "auto" is CUDA where available.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: The model is missing, damaged or of an unsupported type, or the device is not
            available.
    """
    target = resolve_device(device)
    config = load_config(source)
    family_named(config.model_type)
    weights = resolve_dtype(dtype)
    try:
        if getattr(config, "quantization_config", None) is not None:
            number = weights if isinstance(weights, torch.dtype) else None
            opened = open_dequantized(folder_of(source), config, number)
            model, missing = opened.model, opened.missing
            mark_weight_format(model, opened.weight_format)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=weights, output_loading_info=True, **NO_CODE
            )
            missing = report["missing_keys"]
    except UserError:
        raise
    except Exception as error:
        raise unreadable("model", source, error) from error
    # transformers fills these with random numbers and a warning.
    if missing:
        raise UserError(
            f"The weights of {source!r} lack {min(missing)}. Use a complete checkpoint."
        )
    return _require_module(model).to(target).eval()


def load_tokenizer(source: str) -> Any:
    """Open the tokenizer of a model.

    Args:
        source: Model folder, or a name on the Hugging Face hub.

    Raises:
        UserError: There is none, or it is damaged.
    """
    check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source, **NO_CODE)
    except Exception as error:
        raise unreadable("tokenizer", source, error) from error


def context_length(config: Any) -> int:
    """Return the longest sequence that a model was made for, in tokens."""
    return int(config.max_position_embeddings)


def _require_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
