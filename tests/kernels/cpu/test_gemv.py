from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal.foundation.errors import UserError
from tests.kernels.cases import draw, exact
from tests.kernels.cpu.cases import (
    DTYPES,
    assert_precise,
    dtypes,
    operands_of,
    parts,
)

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import compute
from teal.kernels.cpu.numerics import ELEMENTS


def _product(x: Tensor, weight: Tensor, threshold: float, **vectors: Tensor) -> Tensor:
    return compute(operands_of(x, weight, threshold, **vectors))


def test_a_norm_weight_of_another_dtype_normalizes_as_the_reference_does() -> None:
    operands = parts(torch.bfloat16, 2, (64, 33), norm_weight=draw(700, seed=5))
    assert_precise(compute(operands), operands)


def test_bits_do_not_depend_on_the_number_of_threads_or_the_call(two_threads: None) -> None:
    x, weight = draw(4, 300, dtype=torch.bfloat16), draw(300, 1031, dtype=torch.bfloat16, seed=1)
    by_two = [_product(x, weight, 0.5) for _ in range(5)]
    torch.set_num_threads(1)
    by_one = _product(x, weight, 0.5)
    assert all(torch.equal(product, by_one) for product in by_two)


@dtypes
def test_rows_give_the_bits_of_their_products_alone_when_all_channels_are_kept(
    dtype: torch.dtype,
) -> None:
    x, weight = draw(5, 130, dtype=dtype), draw(130, 70, dtype=dtype, seed=1)
    alone = torch.stack([_product(row, weight, -1.0) for row in x])
    assert torch.equal(_product(x, weight, -1.0), alone)


@dtypes
def test_layout_of_the_inputs_does_not_change_the_bits(dtype: torch.dtype) -> None:
    x, weight = draw(3, 130, dtype=dtype), draw(130, 200, dtype=dtype, seed=1)
    part = slice(64, 135)
    expected = _product(x, weight[:, part].contiguous(), 0.5)
    assert torch.equal(_product(x, weight[:, part], 0.5), expected)
    assert torch.equal(_product(x.T.contiguous().T, weight[:, part], 0.5), expected)


def test_products_of_two_python_threads_do_not_disturb_each_other(two_threads: None) -> None:
    weight = draw(300, 1031, dtype=torch.bfloat16)
    inputs = [draw(300, dtype=torch.bfloat16, seed=seed) for seed in range(40)]
    expected = [_product(x, weight, 0.5) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        products = list(pool.map(lambda x: _product(x, weight, 0.5), inputs))
    assert all(map(torch.equal, products, expected))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_sizes_give_an_empty_sum(shape: tuple[int, int]) -> None:
    product = _product(torch.ones(2, shape[0]), torch.ones(shape), 0.0)
    assert torch.equal(product, torch.zeros(2, shape[1]))
    assert _product(torch.ones(0, 4), torch.ones(4, 3), 0.0).shape == (0, 3)


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 8),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    channel=st.integers(0, 69),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_and_a_threshold_equal_to_an_entry_match_the_exact_product(
    seed: int, rows: int, in_features: int, out_features: int, dtype: torch.dtype, channel: int
) -> None:
    x = draw(rows, in_features, dtype=dtype, seed=seed)
    weight = draw(in_features, out_features, dtype=dtype, seed=seed + 1)
    threshold = float(x[0, channel % in_features].abs())
    expected = exact(x, weight, threshold)
    magnitude = x.abs().double() @ weight.abs().double()
    allowed = torch.finfo(dtype).eps * expected.abs() + 1e-6 * magnitude
    assert ((_product(x, weight, threshold).double() - expected).abs() <= allowed).all()


def test_a_weight_with_columns_apart_is_refused_rather_than_copied_for_every_token() -> None:
    with pytest.raises(UserError, match=r"weight\.contiguous"):
        _product(torch.ones(4), torch.ones(3, 4).T, 0.0)


def test_every_dtype_has_a_numba_type_of_its_own() -> None:
    assert len({type(element) for element in ELEMENTS.values()}) == len(ELEMENTS)
