"""Quantizing the projections of a model by rounding to nearest or GPTQ, and saving the result."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teal.checkpoints.compressed_tensors import compressed_config, compressed_tensors
from teal.data import TokenWindows
from teal.foundation.artifact import read_json, replace_folder
from teal.foundation.errors import UserError
from teal.foundation.ownership import write_record
from teal.foundation.progress import Progress, silent
from teal.foundation.version import __version__
from teal.linear import SparseLinear
from teal.models.blocks import Batch, first_batches, resident, run_block
from teal.models.families import Block, blocks_of, projections_of
from teal.models.weight_format import mark_weight_format, weight_format_of
from teal.quantization import (
    FLOAT,
    GROUP_SIZES,
    QuantizedWeight,
    Scheme,
    SecondMoments,
    quantize_by_moments,
    round_to_nearest,
)

SCHEMA_VERSION = 1

# Kind of the folders that `save_quantized` writes.
QUANTIZATION = "quantization"


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    scheme: Scheme,
    tokens: TokenWindows | None = None,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> dict[str, QuantizedWeight]:
    """Quantize every projection and, in place, replace its weight by the dequantized one.

    With tokens it runs GPTQ, block by block and within a block input by input, so that all earlier
    projections are already quantized when the activations of an input are measured.

    Args:
        model: A dense Hugging Face causal language model of a supported family.
        scheme: Format, group size and symmetry.
        tokens: Text for GPTQ; `None` rounds weights to nearest.
        device: Device on which blocks run and are quantized; `None` is the device they are on.
        batch_size: Windows per forward pass.
        progress: Shows the blocks while they are quantized.

    Returns:
        Quantized weight of every projection by its dotted module name, on the CPU.

    Raises:
        UserError: The model is sparse or quantized, its sizes are no multiple of the group size,
            or its weights or activations hold NaN or infinity.
    """
    _require_dense(model)
    _require_whole_groups(model, scheme)
    linears = projections_of(model)
    batches = [] if tokens is None else first_batches(model, tokens.tokens, batch_size=batch_size)
    weights: dict[str, QuantizedWeight] = {}
    for index, block in enumerate(progress(blocks_of(model), "quantize")):
        home = next(block.module.parameters()).device
        with resident(block.module, torch.device(device or home)):
            for names in block.inputs.values():
                moments = _observed(linears[names[0]], block, batches, index)
                weights |= {name: _quantize(linears[name], scheme, moments) for name in names}
            for batch in batches:
                output = run_block(block, batch.hidden_states, batch.arguments[index])
                batch.hidden_states = output.to(batch.hidden_states.device)
    mark_weight_format(model, scheme.format)
    return weights


@torch.no_grad()
def quantize_head(model: Any) -> None:
    """Round the output head to int8 and, in place, replace its weight by the dequantized one.

    A tied embedding is not changed; the head gets a weight of its own.

    Args:
        model: A dense Hugging Face causal language model.
    """
    head = model.get_output_embeddings()
    rounded = round_to_nearest(head.weight.T.contiguous(), Scheme(format="int8"))
    head.weight = nn.Parameter(rounded.dequantize(head.weight.dtype).T.contiguous())


def save_quantized(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    weights: Mapping[str, QuantizedWeight],
    scheme: Scheme,
    *,
    tokens: TokenWindows | None = None,
    force: bool = False,
) -> None:
    """Write a model folder in the compressed-tensors layout, which transformers reads.

    Args:
        folder: Destination, written whole or not at all.
        model: The model; all its weights are written but those of the quantized projections.
        tokenizer: Tokenizer of the model.
        weights: Quantized projections, as `quantize_model` returned them.
        scheme: Scheme given to `quantize_model`.
        tokens: Text given to `quantize_model`.
        force: Whether to replace a folder that an earlier call wrote.

    Raises:
        UserError: The destination cannot be written.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = compressed_config(scheme, [name for name in linears if name not in weights])
    record = {
        "schema_version": SCHEMA_VERSION,
        "method": "rtn" if tokens is None else "gptq",
        "text": None if tokens is None else tokens.provenance.to_dict(),
        "library_version": __version__,
    }
    with replace_folder(folder, QUANTIZATION, force=force) as temporary:
        tokenizer.save_pretrained(temporary)
        saved: Any = model
        saved.save_pretrained(temporary, state_dict=_state(model, weights, scheme))
        _share(temporary)
        content = read_json(temporary / "config.json") | {"quantization_config": config}
        config_text = json.dumps(content, indent=2) + "\n"
        (temporary / "config.json").write_text(config_text, encoding="utf-8")
        write_record(temporary, QUANTIZATION, record)


class _SeenEnough(Exception):  # noqa: N818  (no error)
    """Stops the run of a block once the activations of interest have been seen."""


def _require_dense(model: nn.Module) -> None:
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise UserError("The model is sparse. Quantize it dense: call densify(model) first.")
    if weight_format_of(model) != FLOAT:
        raise UserError("The model is quantized already. Quantize the dense model it came from.")


def _require_whole_groups(model: nn.Module, scheme: Scheme) -> None:
    for name, linear in projections_of(model).items():
        if scheme.group_size and linear.in_features % scheme.group_size:
            fitting = [str(size) for size in GROUP_SIZES if linear.in_features % size == 0]
            cure = f"Use a group size of {' or '.join(fitting)}" if fitting else "Use int8 or fp8"
            raise UserError(
                f"The {linear.in_features} inputs of {name} are not a multiple of the group size "
                f"{scheme.group_size}. {cure}."
            )


def _observed(
    linear: nn.Linear, block: Block, batches: Sequence[Batch], index: int
) -> SecondMoments | None:
    """Return the second moments of a projection's input; `None` without batches."""
    if not batches:
        return None
    moments = SecondMoments(linear.in_features, linear.weight.device)

    def observe(_linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0])
        raise _SeenEnough

    handle = linear.register_forward_pre_hook(observe)
    try:
        for batch in batches:
            with suppress(_SeenEnough):
                run_block(block, batch.hidden_states, batch.arguments[index])
    finally:
        handle.remove()
    return moments


def _quantize(linear: nn.Linear, scheme: Scheme, moments: SecondMoments | None) -> QuantizedWeight:
    """Quantize a projection and, in place, replace its weight by the dequantized one."""
    dense = linear.weight.T.contiguous()
    if moments is None:
        weight = round_to_nearest(dense, scheme)
    else:
        weight = quantize_by_moments(dense, moments, scheme)
    linear.weight.copy_(weight.dequantize(dense.dtype).T)
    return weight.to("cpu")


def _state(
    model: nn.Module, weights: Mapping[str, QuantizedWeight], scheme: Scheme
) -> dict[str, Tensor]:
    dense = {f"{name}.weight" for name in weights}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in dense}
    for name, weight in weights.items():
        tensors = compressed_tensors(weight, scheme)
        state |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return state


def _share(folder: Path) -> None:
    """Give weight files the permissions of config.json; safetensors makes them private."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
