"""Opens a model for the engine, from memory, a folder or the Hugging Face hub."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from teal.checkpoints.location import folder_of, load_config
from teal.engine.detokenizer import Tokenizer
from teal.engine.weights.checkpoint import from_folder
from teal.engine.weights.decoder_weights import DecoderWeights
from teal.engine.weights.quantized import quantized_head
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from teal.models.architectures import Architecture, architecture_of
from teal.models.families import model_type_of
from teal.models.loading import load_tokenizer
from teal.models.placement import resolve_device, resolve_dtype
from teal.models.weight_format import weight_format_of
from teal.quantization import FLOAT, Scheme


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedModel:
    """A model ready to be run by the engine.

    Attributes:
        architecture: Architecture of the model.
        weights: Weights of the model.
        weight_format: Format whose values the projections have: "float", "int8", "int4" or "fp8".
        tokenizer: Tokenizer of the model, or `None`.
        end_tokens: Token ids that end a text.
    """

    architecture: Architecture
    weights: DecoderWeights
    weight_format: str = FLOAT
    tokenizer: Tokenizer | None = None
    end_tokens: frozenset[int] = frozenset()


def open_model(
    model: nn.Module | str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | Scheme | None = None,
    quantize_head: bool = False,
) -> OpenedModel:
    """Open a model for the engine.

    Args:
        model: A Hugging Face model, whose parameters become views of fused weights in place; or a
            model folder; or a name on the Hugging Face hub.
        tokenizer: Tokenizer of the model; by default the one in the folder, if there is one.
        device: "auto", "cpu" or "cuda"; a model in memory stays where it is.
        dtype: "auto", "float32", "bfloat16" or "float16"; a model in memory keeps its dtype.
        quantize: "int8", "int4" or "fp8", or a scheme: format to which projections are rounded to
            nearest, one after the other. A quantized checkpoint is opened as it is.
        quantize_head: Round the LM head to int8 too.

    Raises:
        UserError: The model does not exist, is not supported, does not fit into memory or is
            quantized already, or a device or dtype was given for a model in memory.
    """
    scheme = Scheme(format=quantize) if isinstance(quantize, str) else quantize
    if isinstance(model, nn.Module):
        _require_as_it_is(device, dtype)
        opened = _from_memory(model, tokenizer, scheme)
    else:
        opened = _from_files(str(model), tokenizer, device, dtype, scheme)
    return replace(opened, weights=quantized_head(opened.weights)) if quantize_head else opened


def _from_files(
    model: str, tokenizer: Tokenizer | None, device: str, dtype: str, scheme: Scheme | None
) -> OpenedModel:
    place, number = resolve_device(device), resolve_dtype(dtype)
    config = load_config(model)
    architecture = architecture_of(config)
    folder = folder_of(model)
    weights = from_folder(
        folder, number if isinstance(number, torch.dtype) else None, place, scheme
    )
    return OpenedModel(
        architecture=architecture,
        weights=weights,
        weight_format=weights.format,
        tokenizer=tokenizer or _tokenizer_in(folder),
        end_tokens=_end_tokens(_generation_config(folder, config)),
    )


def _require_as_it_is(device: str, dtype: str) -> None:
    if (device, dtype) != ("auto", "auto"):
        raise UserError(
            "A device or dtype was given for a model in memory, which stays as it is. "
            "Move or cast the model first, or give its folder."
        )


def _from_memory(
    model: nn.Module, tokenizer: Tokenizer | None, scheme: Scheme | None
) -> OpenedModel:
    model_type_of(model)
    return OpenedModel(
        architecture=architecture_of(model.config),
        weights=from_model(model, scheme),
        weight_format=scheme.format if scheme else weight_format_of(model),
        tokenizer=tokenizer,
        end_tokens=_end_tokens(model.generation_config),
    )


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    is_there = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(str(folder)) if is_there else None


def _generation_config(folder: Path, config: Any) -> Any:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return config


def _end_tokens(config: Any) -> frozenset[int]:
    given = getattr(config, "eos_token_id", None)
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)
