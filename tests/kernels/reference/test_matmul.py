import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teal.kernels.reference.matmul import fold_shift, keep_mask, sparse_activation, sparse_gemv
from tests.helpers import assert_as_precise_as_torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NAN, INF = float("nan"), float("inf")

floats32 = st.floats(width=32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


@given(x=floats32, threshold=st.floats(0, width=32), score_scale=floats32, shift=floats32)
def test_keep_mask_is_its_definition(
    x: float, threshold: float, score_scale: float, shift: float
) -> None:
    score = rounded(abs(rounded(x - shift)) * score_scale)
    keep = keep_mask(
        torch.tensor([x]), threshold, torch.tensor([score_scale]), torch.tensor([shift])
    )
    assert keep.item() is (not score <= threshold)


@DTYPES
@pytest.mark.parametrize(
    ("x", "kept"),
    [
        (0.5, False),
        (-0.5, False),
        (0.0, False),
        (-0.0, False),
        (0.51, True),
        (-0.51, True),
        (NAN, True),
        (INF, True),
        (-INF, True),
    ],
)
def test_score_equal_to_the_threshold_is_dropped_and_what_is_no_number_kept(
    x: float, kept: bool, dtype: torch.dtype, device: torch.device
) -> None:
    assert keep_mask(torch.tensor([x], dtype=dtype, device=device), 0.5).item() is kept


def test_threshold_zero_drops_nothing_but_zeros() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0])
    assert keep_mask(x, 0.0).tolist() == [False, False, True, True, True]


@DTYPES
def test_mask_compares_in_float32_and_not_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0], dtype=dtype)
    just_below, just_above = 1 - 2**-20, 1 + 2**-20
    assert keep_mask(x, just_below).item()
    assert not keep_mask(x, just_above).item()
    scaled = keep_mask(x, 1.0, score_scale=torch.tensor([just_above], dtype=torch.float32))
    assert scaled.item()


def test_scale_and_shift_belong_to_channels() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    keep = keep_mask(x, 1.0, torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert keep.tolist() == [[False, True, True], [True, True, False]]


def test_threshold_as_a_tensor_means_the_same() -> None:
    x = random(3, 65)
    assert torch.equal(keep_mask(x, torch.tensor(0.7)), keep_mask(x, 0.7))


def test_higher_threshold_keeps_a_subset() -> None:
    x = random(4, 129)
    masks = [keep_mask(x, threshold) for threshold in (0.0, 0.3, 0.6, 2.0, INF)]
    for lower, higher in pairwise(masks):
        assert not (higher & ~lower).any()
        assert higher.sum() < lower.sum()


@DTYPES
def test_dropped_entries_become_zero_and_kept_ones_stay_bit_for_bit(
    dtype: torch.dtype, device: torch.device
) -> None:
    x = random(3, 65, dtype=dtype).to(device)
    sparse = sparse_activation(x, 0.6)
    keep = keep_mask(x, 0.6)
    assert sparse.dtype == dtype
    assert torch.equal(sparse[keep], x[keep])
    assert (sparse[~keep] == 0).all()
    assert 0.3 < (~keep).float().mean() < 0.6


def test_dropped_entries_take_the_shift() -> None:
    x, shift = random(3, 65), random(65, seed=1)
    sparse = sparse_activation(x, 0.6, shift=shift)
    keep = keep_mask(x, 0.6, shift=shift)
    assert torch.equal(sparse, torch.where(keep, x, shift.expand(3, -1)))


@DTYPES
@pytest.mark.parametrize("in_features", [63, 129, 1024])
def test_product_is_as_precise_as_that_of_torch(
    in_features: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = random(3, in_features, dtype=dtype).to(device)
    weight = random(in_features, 48, seed=1, dtype=dtype).to(device)
    sparse = x * keep_mask(x, 0.6)
    exact = sparse.double() @ weight.double()
    assert_as_precise_as_torch(sparse_gemv(x, weight, 0.6), sparse @ weight, exact)


def test_product_leaves_no_dropped_channel_in() -> None:
    x = torch.tensor([1.0, 0.1, -1.0])
    weight = torch.tensor([[1.0, 10.0], [NAN, NAN], [2.0, 5.0]])
    assert torch.equal(sparse_gemv(x[[0, 2]], weight[[0, 2]], 0.5), torch.tensor([-1.0, 5.0]))
    weight[1] = 100.0
    assert torch.equal(sparse_gemv(x, weight, 0.5), torch.tensor([-1.0, 5.0]))


def test_zero_input_gives_the_bias() -> None:
    bias = random(7)
    assert torch.equal(sparse_gemv(torch.zeros(2, 5), random(5, 7), 0.0, bias=bias)[1], bias)


def test_threshold_zero_equals_the_dense_product() -> None:
    x, weight = random(1, 65), random(65, 9, seed=1)
    assert torch.equal(sparse_gemv(x, weight, 0.0), x @ weight)


@DTYPES
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_folded_shift_completes_the_product_of_centred_activations(
    with_bias: bool, dtype: torch.dtype
) -> None:
    x, weight = random(3, 65, dtype=dtype), random(65, 9, seed=1, dtype=dtype)
    score_scale, shift = random(65, seed=2).abs(), random(65, seed=3)
    bias = random(9, seed=4, dtype=dtype) if with_bias else None
    product = sparse_gemv(x, weight, 0.6, score_scale, shift, fold_shift(weight, shift, bias))
    # What SparseLinear computes: dropped entries take the shift, then the ordinary product.
    by_torch = sparse_activation(x, 0.6, score_scale, shift) @ weight
    keep = keep_mask(x, 0.6, score_scale, shift)
    exact = torch.where(keep, x.double(), shift.double()) @ weight.double()
    if bias is not None:
        by_torch, exact = by_torch + bias, exact + bias.double()
    assert_as_precise_as_torch(product, by_torch, exact)


def test_nan_in_the_input_shows_in_the_product() -> None:
    x = torch.tensor([0.0, NAN])
    assert sparse_gemv(x, random(2, 3), 5.0).isnan().all()
    assert math.isnan(sparse_activation(x, 5.0)[1].item())
