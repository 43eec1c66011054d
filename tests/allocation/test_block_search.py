from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from teal.allocation.block_error import BlockError
from teal.allocation.block_search import BlockSearch, GreedySettings
from teal.foundation.errors import UserError
from teal.linear import TokenSelection
from teal.methods import MaskRule
from teal.models.blocks import first_batches
from teal.models.families import blocks_of
from teal.sparsification import densify, insert_sparse_linears
from tests.helpers import tiny_model, tiny_tokens

SETTINGS = GreedySettings(step=0.1, until=0.3)
SIZES = {"model.layers.0.self_attn.o_proj": 1, "model.layers.0.mlp.down_proj": 3}


def rule_of(_name: str, sparsity: float) -> MaskRule | None:
    return MaskRule(threshold=sparsity) if sparsity else None


@pytest.fixture
def search() -> Iterator[BlockSearch]:
    model = tiny_model("llama")
    block = blocks_of(model)[0]
    with torch.no_grad():
        batches = first_batches(model, tiny_tokens(1, 16))
        linears = insert_sparse_linears(model, dict.fromkeys(SIZES), TokenSelection(0.0))
        yield BlockSearch(
            BlockError(block, batches, 0),
            linears,
            in_attention={name: block.in_attention(name) for name in SIZES},
            sizes=SIZES,
            rule_of=rule_of,
        )
    densify(model)


def test_search_starts_dense_and_raises_one_projection_per_round(search: BlockSearch) -> None:
    rounds = [(state.sparsities, state.error) for state in search.rounds(SETTINGS)]
    assert rounds[0] == (dict.fromkeys(SIZES, 0.0), 0.0)
    assert len(rounds) == 4
    for (before, _), (after, error) in pairwise(rounds):
        assert sum(after[name] > before[name] for name in SIZES) == 1
        assert error > 0


def test_steps_are_inversely_proportional_to_the_weight_size(search: BlockSearch) -> None:
    for number, state in enumerate(search.rounds(SETTINGS)):
        dropped = sum(SIZES[name] * sparsity for name, sparsity in state.sparsities.items())
        assert dropped == pytest.approx(number * SETTINGS.step * sum(SIZES.values()))


def test_projection_that_a_step_would_empty_stays_dense(
    search: BlockSearch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = GreedySettings(step=0.3, until=0.6)
    last = list(search.rounds(settings))[-1]
    assert last.sparsities["model.layers.0.self_attn.o_proj"] == 0.0
    assert "too coarse for model.layers.0.self_attn.o_proj" in caplog.text


def test_next_block_is_fed_dense_outputs_unless_sparsity_is_propagated(
    search: BlockSearch,
) -> None:
    rounds = [state.sparsities for state in search.rounds(SETTINGS)]
    (dense,) = search.outputs_at(rounds, SETTINGS)
    propagating = GreedySettings(step=0.1, until=0.3, propagate=0.3)
    (sparse,) = search.outputs_at(rounds, propagating)
    assert dense.shape == sparse.shape
    assert not torch.equal(dense, sparse)


@pytest.mark.parametrize(
    ("field", "value"), [("step", 0.0), ("until", 1.0), ("propagate", 0.8)], ids=str
)
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=str(value)):
        GreedySettings(**{field: value})  # type: ignore[arg-type]
