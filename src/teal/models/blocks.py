"""Running a model of any family one block at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal.models.families import Block, blocks_of


@dataclass(eq=False)
class Batch:
    """A batch of token windows between two blocks of a model.

    Attributes:
        hidden_states: Input of the next block, (batch, tokens, hidden_size).
        arguments: Keyword arguments of each block, such as masks and positions; they do not
            depend on the hidden states.
        padding: 1 for a token, 0 for padding, (batch, tokens), or `None` without padding.
    """

    hidden_states: Tensor
    arguments: Sequence[dict[str, Any]]
    padding: Tensor | None


def first_batches(
    model: nn.Module, tokens: Tensor, *, padding: Tensor | None = None, batch_size: int = 1
) -> list[Batch]:
    """Compute the input of the first block of `model` for token windows; no block is run.

    Args:
        model: A supported causal language model.
        tokens: Token ids, (windows, sequence_length), int64.
        padding: 1 for a token, 0 for padding, (windows, sequence_length).
        batch_size: Windows per batch.

    Returns:
        Batches, on the device of the model's embedding.
    """
    windows = torch.split(tokens, batch_size)
    masks = [None] * len(windows) if padding is None else torch.split(padding, batch_size)
    pairs = zip(windows, masks, strict=True)
    return [_first_batch(model, window, mask) for window, mask in pairs]


@torch.no_grad()
def run_block(block: Block, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Run one block on the device of its weights.

    Args:
        block: The block.
        hidden_states: Input, (batch, tokens, hidden_size), on any device.
        arguments: Keyword arguments of the block, from a `Batch`.

    Returns:
        Output, (batch, tokens, hidden_size), on the block's device.
    """
    device = next(block.module.parameters()).device
    output = block.module(hidden_states.to(device), **_moved(arguments, device))
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep `module` on `device` inside the with statement, then move it back."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@torch.no_grad()
def _first_batch(model: nn.Module, tokens: Tensor, padding: Tensor | None) -> Batch:
    blocks = blocks_of(model)
    recorders = [_Recorder(block.module) for block in blocks]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    mask = None if padding is None else padding.to(device)
    with _replaced(model, blocks, recorders):
        # The base model has no head; logits are not needed.
        model.base_model(tokens.to(device), attention_mask=mask, use_cache=False)  # type: ignore[operator]
    first = recorders[0].hidden_states
    assert first is not None
    return Batch(first, [recorder.arguments for recorder in recorders], padding)


class _Recorder(nn.Module):
    """Stands in for a block: records its arguments and returns its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Some families read attributes of their blocks, such as attention_type.
        self._block = (block,)
        self.hidden_states: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


@contextmanager
def _replaced(
    model: nn.Module, blocks: Sequence[Block], substitutes: Sequence[nn.Module]
) -> Iterator[None]:
    try:
        for block, substitute in zip(blocks, substitutes, strict=True):
            model.set_submodule(block.name, substitute)
        yield
    finally:
        for block in blocks:
            model.set_submodule(block.name, block.module)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in value)
    return value
