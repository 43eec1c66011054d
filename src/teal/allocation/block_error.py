"""How far the output of one block is from that of the dense block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from teal.models.blocks import Batch, run_block
from teal.models.families import Block


class BlockError:
    """Squared error of one block's output on cached inputs, relative to the dense output.

    Has to be built while nothing in the block is dropped yet.

    Attributes:
        dense_outputs: Output of the dense block for every batch, (batch, tokens, hidden_size).
        dense_attention: Output of its attention module for every batch.
    """

    def __init__(self, block: Block, batches: Sequence[Batch], index: int) -> None:
        self._block = block
        self._batches = batches
        self._index = index
        self.dense_outputs, self.dense_attention = self.run()
        self._norm = sum(_energy(output) for output in self.dense_outputs)

    def run(self) -> tuple[list[Tensor], list[Any]]:
        """Run the block as it is now; return its and its attention module's outputs per batch."""
        attention: list[Any] = []
        with _recording(self._block.attention, attention):
            return [self._output(batch) for batch in self._batches], attention

    def measure(self) -> tuple[float, list[Any]]:
        """Return the error of the block as it is now, and its attention module's outputs."""
        outputs, attention = self.run()
        return self._against_dense(outputs), attention

    def measure_after(self, attention: Sequence[Any]) -> float:
        """Return the error of the block as it is now, given its attention module's outputs."""
        outputs = []
        for batch, result in zip(self._batches, attention, strict=True):
            with _replaying(self._block.attention, result):
                outputs.append(self._output(batch))
        return self._against_dense(outputs)

    def _output(self, batch: Batch) -> Tensor:
        return run_block(self._block, batch.hidden_states, batch.arguments[self._index])

    def _against_dense(self, outputs: Sequence[Tensor]) -> float:
        pairs = zip(outputs, self.dense_outputs, strict=True)
        return sum(_energy(output.float() - dense.float()) for output, dense in pairs) / self._norm


def _energy(x: Tensor) -> float:
    return x.float().square().sum(dtype=torch.float64).item()


@contextmanager
def _recording(module: nn.Module, outputs: list[Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaying(module: nn.Module, output: Any) -> Iterator[None]:
    """Let `module` return `output` without computing anything."""
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        # The instance attribute; the class's own method comes back.
        del module.forward
