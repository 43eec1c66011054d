import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from teal.kernels.reference.matmul import keep_mask, sparse_activation
from teal.linear import (
    DECODE_ROWS,
    SparseLinear,
    SparsityMeter,
    TokenSelection,
    first_sparse,
)
from teal.methods import MaskRule
from tests.helpers import TOLERANCES, relative_error

IN_FEATURES, OUT_FEATURES = 24, 10
RULE = MaskRule(threshold=0.6)


def sparse_linear(
    sparse_from: float = 0.0, rule: MaskRule | None = RULE, *, bias: bool = True
) -> SparseLinear:
    torch.manual_seed(0)
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=bias)
    return SparseLinear(linear, rule, TokenSelection(sparse_from))


def activations(*shape: int) -> Tensor:
    return torch.randn((*shape, IN_FEATURES), generator=torch.Generator().manual_seed(1))


def sparse_rows(linear: SparseLinear, x: Tensor) -> Tensor:
    """Tell which tokens come out as they would if every token were sparse."""
    dense = linear.replaced(x)
    sparse = F.linear(sparse_activation(x, RULE.threshold), linear.weight, linear.bias)
    assert not torch.isclose(dense, sparse).all(-1).any()
    output = linear(x)
    is_sparse = torch.isclose(output, sparse).all(-1)
    assert (is_sparse ^ torch.isclose(output, dense).all(-1)).all()
    return is_sparse


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_product_is_that_of_the_kept_activations(bias: bool) -> None:
    linear, x = sparse_linear(bias=bias), activations(2, 11)
    sparse = x * keep_mask(x, RULE.threshold)
    assert torch.equal(linear(x), F.linear(sparse, linear.weight, linear.bias))


@pytest.mark.parametrize(
    "shape",
    [(DECODE_ROWS,), (1, 1), (DECODE_ROWS, 1), (1, DECODE_ROWS), (2, DECODE_ROWS // 2)],
    ids=str,
)
@pytest.mark.parametrize("sparse_from", [0.0, 0.5, 1.0])
def test_few_rows_are_decoding_in_whatever_shape(
    shape: tuple[int, ...], sparse_from: float
) -> None:
    assert sparse_rows(sparse_linear(sparse_from), activations(*shape)).all()


@pytest.mark.parametrize("shape", [(DECODE_ROWS + 1,), (DECODE_ROWS + 1, 1), (3, 4)], ids=str)
def test_many_rows_are_dense_by_default(shape: tuple[int, ...]) -> None:
    linear, x = sparse_linear(1.0), activations(*shape)
    assert torch.equal(linear(x), linear.replaced(x))


@pytest.mark.parametrize(
    ("sparse_from", "first"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.51, 7), (0.999, 12), (1.0, 12)]
)
def test_tokens_are_sparse_from_a_fraction_of_the_sequence_on(
    sparse_from: float, first: int
) -> None:
    expected = torch.arange(12) >= first
    found = sparse_rows(sparse_linear(sparse_from), activations(3, 12))
    assert torch.equal(found, expected.expand(3, 12))


def test_mask_of_the_pass_decides_where_it_fits() -> None:
    linear, x = sparse_linear(0.5), activations(2, 12)
    linear.selection.mask = torch.rand((2, 12), generator=torch.Generator().manual_seed(2)) > 0.5
    assert torch.equal(sparse_rows(linear, x), linear.selection.mask)


def test_without_a_rule_nothing_is_dropped() -> None:
    linear, x = sparse_linear(0.0, None), activations(2, 12)
    assert torch.equal(linear(x), linear.replaced(x))


def test_rule_may_be_exchanged() -> None:
    linear, x = sparse_linear(), activations(1, 12)
    linear.rule = MaskRule(threshold=float("inf"))
    assert linear.bias is not None
    assert torch.equal(linear(x), linear.bias.expand(1, 12, -1))


def test_dropped_entries_take_the_shift_and_scores_the_scale() -> None:
    generator = torch.Generator().manual_seed(3)
    score_scale, shift = torch.rand((2, IN_FEATURES), generator=generator)
    linear, x = (
        sparse_linear(rule=MaskRule(threshold=0.3, score_scale=score_scale, shift=shift)),
        activations(9),
    )
    exact = F.linear(
        torch.where((x - shift).abs() * score_scale <= 0.3, shift, x).double(),
        linear.weight.double(),
        linear.bias.double(),
    )
    assert relative_error(linear(x), exact) < TOLERANCES["logits"]


def test_parameters_are_the_very_ones_of_the_replaced_layer() -> None:
    linear = sparse_linear()
    assert linear.weight is linear.replaced.weight
    assert linear.bias is linear.replaced.bias
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]
    assert list(linear.state_dict()) == list(linear.replaced.state_dict())
    assert list(linear.modules()) == [linear]


def test_printed_model_shows_size_and_threshold() -> None:
    assert repr(sparse_linear()) == (
        "SparseLinear(in_features=24, out_features=10, bias=True, threshold=0.6)"
    )
    assert "bias=False, threshold=none" in repr(sparse_linear(rule=None, bias=False))


@pytest.mark.parametrize("sparse_from", [0.0, 0.5])
def test_meter_counts_the_sparse_tokens_alone(sparse_from: float) -> None:
    linear, x = sparse_linear(sparse_from), activations(2, 12)
    linear.meter = SparsityMeter()
    linear(x)
    counted = x[:, first_sparse(12, sparse_from) :]
    expected = (counted.abs() <= RULE.threshold).double().mean().item()
    assert linear.meter.sparsity == pytest.approx(expected, abs=1e-12)


def test_meter_goes_on_counting_and_starts_at_zero() -> None:
    meter = SparsityMeter()
    assert meter.sparsity == 0.0
    meter.add(torch.tensor([[True, False]]))
    meter.add(torch.tensor([[False, False]]))
    assert meter.sparsity == 0.75


@given(length=st.integers(1, 10_000), sparse_from=st.floats(0, 1))
def test_first_sparse_is_the_first_position_not_before_the_fraction(
    length: int, sparse_from: float
) -> None:
    first = first_sparse(length, sparse_from)
    assert 0 <= first <= length
    assert first >= sparse_from * length
    assert first == 0 or first - 1 < sparse_from * length
