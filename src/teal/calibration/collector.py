"""Calibration: running a model block by block on text and measuring its projection inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from teal.calibration.artifact import CalibrationStats
from teal.calibration.input_statistics import InputStatistics
from teal.data import TokenWindows
from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.foundation.progress import Progress, silent
from teal.foundation.provenance import TextProvenance, fingerprint
from teal.foundation.version import __version__
from teal.linear import SparseLinear
from teal.models.blocks import Batch, first_batches, resident, run_block
from teal.models.families import Block, blocks_of, identity_of
from teal.models.weight_format import weight_format_of


@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokens: TokenWindows | Tensor,
    *,
    padding: Tensor | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    progress: Progress = silent,
) -> CalibrationStats:
    """Measure the inputs of every projection of `model` on a text.

    Blocks run one after the other, each on all windows, so only one block at a time has to be on
    `device`. The only activations kept are the hidden states between two blocks; they stay on the
    model's device.

    Args:
        model: A dense Hugging Face causal language model of a supported family.
        tokens: Token windows, or token ids, (windows, sequence_length), int64.
        padding: 1 for a token, 0 for padding, (windows, sequence_length); padding is not counted.
        device: Device on which blocks run; `None` is the device they are on.
        batch_size: Windows per forward pass.
        progress: Shows the blocks while they are measured.

    Returns:
        Statistics of every distinct projection input.

    Raises:
        UserError: The model is sparse or unsupported, there are no tokens, or activations hold NaN
            or infinity.
    """
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise UserError("The model is sparse. Calibrate it dense: call densify(model) first.")
    weight_format = weight_format_of(model)
    windows = tokens if isinstance(tokens, TokenWindows) else _unnamed(tokens)
    batches = first_batches(model, windows.tokens, padding=padding, batch_size=batch_size)
    identity = identity_of(model)
    inputs: dict[str, InputStatistics] = {}
    for index, block in enumerate(progress(blocks_of(model), "calibrate")):
        home = next(block.module.parameters())
        statistics = _empty_statistics(block, identity, home.dtype)
        with resident(block.module, torch.device(device or home.device)):
            for batch in batches:
                with _observing(model, statistics, batch):
                    output = run_block(block, batch.hidden_states, batch.arguments[index])
                batch.hidden_states = output.to(batch.hidden_states.device)
        inputs |= statistics
    return CalibrationStats(
        model=identity,
        text=windows.provenance,
        dtype=next(iter(inputs.values())).dtype,
        inputs=inputs,
        library_version=__version__,
        weight_format=weight_format,
    )


def _unnamed(tokens: Tensor) -> TokenWindows:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise UserError(
            f"Tokens have shape {tuple(tokens.shape)}. Give token ids (windows, sequence_length)."
        )
    provenance = TextProvenance(
        source="token ids",
        sha256=None,
        offset=0,
        num_tokens=tokens.numel(),
        sequence_length=tokens.shape[1],
        fingerprints=fingerprint(tokens.flatten()),
    )
    return TokenWindows(tokens, provenance)


def _empty_statistics(
    block: Block, identity: ModelIdentity, dtype: torch.dtype
) -> dict[str, InputStatistics]:
    return {
        name: InputStatistics(
            projections=projections,
            in_features=identity.shapes[projections[0]][0],
            dtype=str(dtype).removeprefix("torch."),
        )
        for name, projections in block.inputs.items()
    }


@contextmanager
def _observing(
    model: nn.Module, statistics: dict[str, InputStatistics], batch: Batch
) -> Iterator[None]:
    """Add the inputs of the projections to `statistics` inside the with statement."""
    real = None if batch.padding is None else batch.padding.bool()

    def hook_for(observed: InputStatistics) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            observed.add(x.flatten(0, -2) if real is None else x[real.to(x.device)])

        return hook

    handles = [
        model.get_submodule(observed.projections[0]).register_forward_pre_hook(hook_for(observed))
        for observed in statistics.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
