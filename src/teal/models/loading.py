"""How a model and its tokenizer are opened, with errors that say what is wrong."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from teal.checkpoints.dequantized import open_dequantized
from teal.foundation.errors import UserError
from teal.models.families import family_named
from teal.models.weight_format import mark_weight_format

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(source: str, *, dtype: str = "auto", device: str = "auto") -> Any:
    """Open a Hugging Face causal language model of a supported family for inference.

    A quantized checkpoint becomes a model of floats with the values of its codes.

    Args:
        source: Model folder, or a name on the Hugging Face hub.
        dtype: One of `DTYPES`; "auto" is the checkpoint's own.
        device: One of `DEVICES`; "auto" is CUDA where present.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: No model there, damaged, of an unsupported type, or no such device.
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
                source, dtype=weights, output_loading_info=True
            )
            missing = report["missing_keys"]
    except UserError:
        raise
    except Exception as error:
        raise _unreadable("model", source, error) from error
    # transformers fills these with random numbers and a warning.
    if missing:
        raise UserError(
            f"The weights of {source!r} lack {min(missing)}. Use a complete checkpoint."
        )
    return _require_module(model).to(target).eval()


def load_config(source: str) -> Any:
    """Read a model's configuration without its weights.

    Raises:
        UserError: As `load_model`.
    """
    _check_source(source)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:
        raise _unreadable("model configuration", source, error) from error


def folder_of(source: str) -> Path:
    """Return the folder of a model, after downloading it where `source` is a name on the hub."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, allow_patterns=_FILES))


def load_tokenizer(source: str) -> Any:
    """Open the tokenizer that belongs to a model.

    Raises:
        UserError: There is none, or it is damaged.
    """
    _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise _unreadable("tokenizer", source, error) from error


def context_length(config: Any) -> int:
    """Return the longest sequence that a model was made for, in tokens."""
    return int(config.max_position_embeddings)


def resolve_device(device: str) -> torch.device:
    """Turn one of `DEVICES` into a device that is there.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if device not in DEVICES:
        raise UserError(f"Unknown device {device!r}. Known: {', '.join(DEVICES)}.")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("No CUDA device is available here. Use --device cpu.")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def resolve_dtype(dtype: str) -> torch.dtype | str:
    """Turn one of `DTYPES` into what `from_pretrained` takes.

    Raises:
        UserError: It is none of them.
    """
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _check_source(source: str) -> None:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{source!r} is not a model folder: it has no config.json. "
                "Give a folder that save_pretrained wrote."
            )
    # A path below a folder that is here is a misspelt one, not a name on the hub.
    elif folder.exists() or folder.parent.is_dir() or not _HUB_NAME.fullmatch(source):
        raise UserError(
            f"{source!r} is not a model folder. Give a folder with config.json, weights and "
            "tokenizer, or a name on the Hugging Face hub such as 'meta-llama/Llama-3.1-8B'."
        )


def _require_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _unreadable(what: str, source: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"Cannot open the {what} of {source!r}: {reason} Check the folder or name.")
