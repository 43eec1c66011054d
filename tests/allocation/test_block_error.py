from collections.abc import Iterator

import pytest
import torch

from teal.allocation.block_error import BlockError
from teal.linear import SparseLinear, TokenSelection
from teal.methods import MaskRule
from teal.models.blocks import first_batches
from teal.models.families import FAMILIES, Block, blocks_of
from teal.sparsification import insert_sparse_linears
from tests.helpers import tiny_model, tiny_tokens

Prepared = tuple[Block, dict[str, SparseLinear], BlockError]


@pytest.fixture(params=sorted(FAMILIES))
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    """A block with sparse linears that drop nothing yet, and its error."""
    model = tiny_model(request.param)
    block = blocks_of(model)[0]
    linears = insert_sparse_linears(model, dict.fromkeys(block.projections), TokenSelection(0.0))
    with torch.no_grad():
        yield block, linears, BlockError(block, first_batches(model, tiny_tokens(2, 24)), 0)


def test_an_untouched_block_has_no_error(prepared: Prepared) -> None:
    _, _, error = prepared
    assert error.measure()[0] == 0.0


def test_error_is_the_share_of_the_output_energy(prepared: Prepared) -> None:
    block, linears, error = prepared
    linears[block.projections[-1]].rule = MaskRule(threshold=0.1)
    outputs, _ = error.run()
    wrong = sum(
        (o - d).double().square().sum() for o, d in zip(outputs, error.dense_outputs, strict=True)
    )
    total = sum(d.double().square().sum() for d in error.dense_outputs)
    assert error.measure()[0] == pytest.approx(float(wrong / total), rel=1e-5)
    assert error.measure()[0] > 0.0


def test_mlp_trials_with_remembered_attention_equal_whole_runs(prepared: Prepared) -> None:
    block, linears, error = prepared
    linears[block.projections[0]].rule = MaskRule(threshold=0.3)
    _, attention = error.measure()
    linears[block.projections[-1]].rule = MaskRule(threshold=0.1)
    assert error.measure_after(attention) == error.measure()[0]


def test_attention_does_not_run_where_it_is_remembered(prepared: Prepared) -> None:
    block, _, error = prepared
    calls = []
    handle = block.attention.register_forward_pre_hook(lambda *_: calls.append(1))
    attention_input = next(iter(block.inputs.values()))[0].removeprefix(f"{block.name}.")
    inner = block.module.get_submodule(attention_input)
    inner_calls = []
    inner_handle = inner.register_forward_hook(lambda *_: inner_calls.append(1))
    error.measure_after(error.dense_attention)
    handle.remove()
    inner_handle.remove()
    assert calls
    assert not inner_calls


def test_in_attention_tells_the_two_halves_apart(prepared: Prepared) -> None:
    block, _, _ = prepared
    halves = {name.split(".")[3] for name in block.projections if block.in_attention(name)}
    assert halves == {"self_attn"}
