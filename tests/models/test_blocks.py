from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teal.models.blocks import Batch, first_batches, resident, run_block
from teal.models.families import FAMILIES, blocks_of
from tests.helpers import logits_of, padding_of, tiny_model, tiny_tokens

every_family = pytest.mark.parametrize("family", FAMILIES)
# More than the sliding window of every tiny model.
LENGTH = 24


def before_final_norm(model: Any, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
    """Run the model's own forward pass and return the output of its last block."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits_of(model, tokens, attention_mask=padding)
    handle.remove()
    return seen[0]


def run_all(model: nn.Module, batch: Batch) -> Tensor:
    hidden_states = batch.hidden_states
    for block, arguments in zip(blocks_of(model), batch.arguments, strict=True):
        hidden_states = run_block(block, hidden_states, arguments)
    return hidden_states


@every_family
def test_block_by_block_run_equals_the_forward_pass(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    (batch,) = first_batches(model, tokens, batch_size=2)
    assert torch.equal(run_all(model, batch), before_final_norm(model, tokens))


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_block_by_block_run_of_padded_windows_equals_the_forward_pass(
    family: str, side: str
) -> None:
    model, tokens = tiny_model(family), tiny_tokens(3, LENGTH)
    padding = padding_of([LENGTH, 17, 10], LENGTH, side)
    batches = first_batches(model, tokens, padding=padding, batch_size=2)
    for batch, rows in zip(batches, (slice(0, 2), slice(2, 3)), strict=True):
        expected = before_final_norm(model, tokens[rows], padding[rows])
        assert batch.padding is not None
        assert torch.equal(batch.padding, padding[rows])
        assert torch.equal(run_all(model, batch), expected)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3"])
def test_sliding_window_of_the_tiny_models_is_short_enough_to_matter(family: str) -> None:
    tokens = tiny_tokens(1, LENGTH)
    narrow, wide = tiny_model(family), tiny_model(family, sliding_window=64)
    apart = (before_final_norm(narrow, tokens) != before_final_norm(wide, tokens)).any(-1)[0]
    assert apart.tolist() == [position >= 5 for position in range(LENGTH)]


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_windows_come_in_batches_in_order(batch_size: int, sizes: list[int]) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, LENGTH)
    batches = first_batches(model, tokens, batch_size=batch_size)
    assert [len(batch.hidden_states) for batch in batches] == sizes
    embedded = torch.cat([batch.hidden_states for batch in batches])
    assert torch.equal(embedded, model.get_input_embeddings()(tokens))
    assert all(batch.padding is None for batch in batches)


@every_family
def test_blocks_are_restored_and_not_run(family: str) -> None:
    model = tiny_model(family)
    modules = list(model.named_modules())
    for block in blocks_of(model):
        block.module.register_forward_pre_hook(fail)
    first_batches(model, tiny_tokens(1, LENGTH))
    assert list(model.named_modules()) == modules


def test_blocks_are_restored_after_an_error() -> None:
    model = tiny_model("llama")
    modules = list(model.named_modules())
    model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        first_batches(model, tiny_tokens(1, LENGTH))
    assert list(model.named_modules()) == modules


def test_blocks_run_without_gradients() -> None:
    model = tiny_model("llama")
    (batch,) = first_batches(model, tiny_tokens(1, LENGTH))
    assert not run_all(model, batch).requires_grad


def test_block_runs_on_its_device(device: torch.device) -> None:
    model, tokens = tiny_model("gemma3_text"), tiny_tokens(1, LENGTH)
    (batch,) = first_batches(model, tokens)
    block = blocks_of(model)[0]
    expected = run_block(block, batch.hidden_states, batch.arguments[0])
    with resident(block.module, device):
        output = run_block(block, batch.hidden_states, batch.arguments[0])
    assert output.device.type == device.type
    torch.testing.assert_close(output.cpu(), expected)


def test_module_moves_back_after_an_error(device: torch.device) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), resident(module, device):
        assert module.weight.device.type == device.type
        raise RuntimeError
    assert module.weight.device.type == "cpu"


def fail(*_: Any) -> None:
    raise RuntimeError("on purpose")
