"""The error of one block's output against the dense block."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from teal.models.blocks import Batch, run_block
from teal.models.families import Block


class BlockError:
    """Squared error of one block's output on cached inputs, relative to the dense output.

    It must be built while the block is still dense.

    Args:
        block: The block.
        batches: Inputs of the block.
        index: Index of the block in the model.

    Attributes:
        dense_outputs: Output of the dense block for every batch, (batch, tokens, hidden_size).
        dense_attention: Output of the dense attention module for every batch.
    """

    def __init__(self, block: Block, batches: Sequence[Batch], index: int) -> None:
        self._block = block
        self._batches = batches
        self._index = index
        self.dense_outputs, self.dense_attention = self.run()
        self._norm = sum(_energy(output) for output in self.dense_outputs)

    def run(self) -> tuple[list[Tensor], list[Any]]:
        """Run the block with its present rules.

        Returns:
            Outputs of the block and of its attention module, one each per batch.
        """
        attention: list[Any] = []
        with _recording(self._block.attention, attention):
            return [self._output(batch) for batch in self._batches], attention

    def measure(self) -> tuple[float, list[Any]]:
        """Run the block with its present rules.

        Returns:
            Error of the block, and the outputs of its attention module, one per batch.
        """
        outputs, attention = self.run()
        return self._against_dense(outputs), attention

    def measure_after(self, attention: Sequence[Any]) -> float:
        """Return the error of the block with its present rules and known attention outputs.

        Args:
            attention: Output of the attention module for every batch; it is not run again.
        """
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
    """Make `module` return `output` without running it."""
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        # Deletes the instance attribute, which uncovers the method of the class.
        del module.forward
