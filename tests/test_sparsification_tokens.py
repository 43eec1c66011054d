from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teal.foundation.errors import UserError
from teal.linear import DECODE_ROWS, first_sparse
from teal.models.families import FAMILIES
from teal.sparsification import sparse_linears, sparse_tokens, sparsify
from tests.helpers import (
    TOLERANCES,
    differing,
    logits_of,
    padding_of,
    plan_for,
    tiny_model,
    tiny_tokens,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
LENGTH = 24
# Drops about a third of a tiny model's activations.
THRESHOLD = 0.4


@every_family
@pytest.mark.parametrize(("sparse_from", "first"), [(1.0, 24), (0.5, 12), (0.52, 13), (0.0, 0)])
def test_tokens_are_sparse_from_a_fraction_of_the_sequence_on(
    family: str, sparse_from: float, first: int
) -> None:
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    dense = logits_of(model, tokens)
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=sparse_from)
    expected = (torch.arange(LENGTH) >= first).expand(2, -1)
    assert torch.equal(differing(logits_of(model, tokens), dense), expected)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_logits_of_each_sequence_as_they_were(family: str, side: str) -> None:
    model = tiny_model(family)
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=0.5)
    tokens = tiny_tokens(3, LENGTH)
    padding = padding_of([LENGTH, 17, 10], LENGTH, side)
    padded = logits_of(model, tokens * padding, attention_mask=padding)
    for row in range(3):
        real = padding[row].bool()
        alone = logits_of(model, tokens[row : row + 1, real])[0]
        torch.testing.assert_close(padded[row, real], alone, rtol=0, atol=TOLERANCES["logits"])


@pytest.mark.parametrize("sparse_from", [0.5, 1.0])
@pytest.mark.parametrize("rows", [(1, DECODE_ROWS), (DECODE_ROWS, 1)], ids=str)
def test_few_rows_are_sparse_even_where_prefill_is_dense(
    rows: tuple[int, int], sparse_from: float
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(*rows)
    dense = logits_of(model, tokens)
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=sparse_from)
    assert differing(logits_of(model, tokens), dense).all()


def test_generation_has_dense_prefill_and_sparse_steps() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)
    sparsify(model, plan_for(model, THRESHOLD))
    rows: dict[int, list[bool]] = {}
    for name, linear in sparse_linears(model).items():
        linear.register_forward_pre_hook(
            lambda module, args, name=name: rows.setdefault(args[0].shape[1], []).append(
                module.selection.of(args[0]) is True
            )
        )
    model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert rows == {LENGTH: [False] * 14, 1: [True] * 14 * 3}


@pytest.mark.parametrize("by_position", [True, False], ids=["by position", "by name"])
def test_continuing_a_cache_is_refused_where_positions_decide(by_position: bool) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=0.5)
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"cache of 24 tokens\. Use sparse_from 0 or 1, or one"):
        if by_position:
            model(tokens, None, None, cache)
        else:
            model(tokens, past_key_values=cache)


@pytest.mark.parametrize(("sparse_from", "length"), [(0.0, LENGTH), (1.0, LENGTH), (0.5, 8)])
def test_continuing_a_cache_is_allowed_where_all_tokens_are_alike(
    sparse_from: float, length: int
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=sparse_from)
    cache = model(tokens, use_cache=True).past_key_values
    model(tokens[:, :length], past_key_values=cache)
    assert cache.get_seq_length() == LENGTH + length


def test_failed_pass_leaves_nothing_behind_for_the_next() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, LENGTH)
    sparsify(model, plan_for(model, THRESHOLD), sparse_from=0.5)
    expected = logits_of(model, tokens)
    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        logits_of(model, tokens, attention_mask=padding_of([24, 17, 10], LENGTH, "left"))
    handle.remove()
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("sparse_from", [-0.1, 1.1, float("nan")])
def test_sparse_from_outside_its_range_is_refused(sparse_from: float) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"is outside \[0, 1\]\. Give 1 for dense prefill"):
        sparsify(model, plan_for(model, THRESHOLD), sparse_from=sparse_from)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    sparse_from=st.floats(0, 1) | st.integers(0, 100).map(lambda percent: percent / 100),
    side=st.sampled_from(["left", "right"]),
)
def test_sparse_tokens_are_the_later_real_tokens_of_each_sequence(
    lengths: list[int], sparse_from: float, side: str
) -> None:
    padding = padding_of(lengths, 40, side)
    for row, length in zip(sparse_tokens(padding, sparse_from), lengths, strict=True):
        start = 40 - length if side == "left" else 0
        expected = list(range(start + first_sparse(length, sparse_from), start + length))
        assert row.nonzero().flatten().tolist() == expected


def fail(*_: Any) -> None:
    raise RuntimeError("on purpose")
