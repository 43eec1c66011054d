import math

import numpy as np
import pytest
import torch

from teal.kernels.reference import matmul as reference
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw
from tests.kernels.cpu.cases import (
    DTYPES,
    assert_precise,
    dtypes,
    exact_result,
    operands_of,
    parts,
    torch_result,
)
from tests.pairwise import by_pairs

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import compute
from teal.kernels.cpu.gemv_kernel import border

# Of 16-bit numbers: threads divide the channels into eight shares, into two, or the columns.
WIDTHS = [(700, 500), (3000, 2004), (9000, 8004)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_ulps", [0, 1, -1])
def test_every_16_bit_number_is_read_exactly_and_rounded_to_nearest_even(
    dtype: torch.dtype, half_ulps: int
) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    neighbour = (every.view(torch.int16) + 1).view(dtype)
    difference = (neighbour.float() - every.float()).to(dtype)
    difference = torch.where(difference.isfinite(), difference, 0)
    expected = (every.float() + 0.5 * half_ulps * difference.float()).to(dtype)
    x = torch.tensor([1.0, 0.5 * half_ulps], dtype=dtype)
    product = compute(operands_of(x, torch.stack([every, difference]), 0.0))
    torch.testing.assert_close(product, expected, rtol=0.0, atol=0.0, equal_nan=True)


@dtypes
def test_weight_rows_of_dropped_channels_are_never_used(dtype: torch.dtype) -> None:
    x, weight = draw(200, dtype=dtype), draw(200, 71, dtype=dtype, seed=1)
    product = compute(operands_of(x, weight, 0.6))
    weight[~reference.keep_mask(x, 0.6)] = math.nan
    assert torch.equal(compute(operands_of(x, weight, 0.6)), product)


@dtypes
@pytest.mark.parametrize("size", [(4096, 321), (700, 5003), (300, 17001)], ids=str)
def test_product_of_two_threads_is_as_precise_as_torch(
    dtype: torch.dtype, size: tuple[int, int], two_threads: None
) -> None:
    operands = operands_of(draw(size[0], dtype=dtype), draw(*size, dtype=dtype, seed=1), 0.6)
    assert_precise(compute(operands), operands)


def test_residual_is_added_before_rounding() -> None:
    operands = operands_of(
        draw(2, 130, dtype=torch.bfloat16),
        draw(130, 70, dtype=torch.bfloat16, seed=1),
        0.5,
        residual=100 * draw(2, 70, dtype=torch.bfloat16, seed=2),
    )
    assert_precise(compute(operands), operands)


@by_pairs(
    dtype=DTYPES,
    rows=[1, 2, 3, 8],
    output_sizes=[(129,), (64, 33), (300, 20, 21), (1, 128, 1)],
    given=["everything", "masks", "one mask"],
)
def test_parts_have_masks_of_their_own_and_are_as_precise_as_torch(
    dtype: torch.dtype, rows: int, output_sizes: tuple[int, ...], given: str, two_threads: None
) -> None:
    residual = 20 * draw(rows, sum(output_sizes), dtype=dtype, seed=6)
    operands = parts(dtype, rows, output_sizes, residual=residual)
    if given != "everything":
        operands = operands._replace(score_scale=None, shift=None, norm_weight=None)
    if given == "one mask":
        operands = operands._replace(thresholds=[0.4] * len(output_sizes))
    assert_precise(compute(operands), operands)


@by_pairs(
    dtype=DTYPES,
    rows=[1, 2, 8],
    activation=["silu", "gelu_pytorch_tanh"],
    half=[64, 333, sum(WIDTHS[2]) // 2],
    masks=[1, 2],
)
def test_gate_and_up_are_as_precise_as_torch(
    dtype: torch.dtype, rows: int, activation: str, half: int, masks: int, two_threads: None
) -> None:
    operands = parts(dtype, rows, (half, half), activation=activation)
    if masks == 1:
        operands = operands._replace(score_scale=None, thresholds=[0.4, 0.4])
    assert_precise(compute(operands), operands)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_activations_of_large_and_unusual_numbers_are_those_of_torch(activation: str) -> None:
    gates = torch.tensor(
        [0.0, -0.0, 1e-30, 20.0, -20.0, 88.5, -88.5, 1e4, -1e4, math.inf, -math.inf, math.nan]
    )
    weight = torch.cat([gates, torch.ones(len(gates))])[None]
    operands = operands_of(torch.ones(1), weight, -1.0)
    operands = operands._replace(
        thresholds=[-1.0, -1.0], output_sizes=[len(gates)] * 2, activation=activation
    )
    expected = reference.GATES[activation](gates)
    torch.testing.assert_close(compute(operands), expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("output_sizes", WIDTHS, ids=str)
def test_all_forms_have_the_same_bits_for_any_number_of_threads(
    rows: int, output_sizes: tuple[int, int], two_threads: None
) -> None:
    # Parts keep different numbers of channels, so borders between threads are not in the middle.
    linear = parts(torch.bfloat16, rows, output_sizes, thresholds=[0.0, 5.0])
    half = sum(output_sizes) // 2
    forms = [linear, linear._replace(output_sizes=(half, half), activation="silu")]
    by_two = [compute(operands) for operands in forms]
    torch.set_num_threads(1)
    assert all(map(torch.equal, by_two, [compute(operands) for operands in forms]))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "sizes, counts",
    [((640,), (100,)), ((300, 20, 21), (5, 700, 0)), ((0, 64), (3, 3)), ((1, 1), (9, 9))],
    ids=str,
)
def test_borders_divide_all_columns_among_the_threads_in_order(
    threads: int, sizes: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    described = (len(sizes), *sizes, 0, 0)[:4]
    borders = [
        border(described, np.array(counts), 16, thread, threads) for thread in range(threads + 1)
    ]
    assert borders[0] == 0
    assert borders[-1] == sum(sizes)
    assert borders == sorted(borders)


def test_borders_give_each_thread_about_as_many_bytes_to_read() -> None:
    # The first half keeps nine times as many channels, so it takes nine tenths of the threads.
    borders = [border((2, 1600, 1600, 0), np.array([899, 99]), 16, t, 10) for t in range(11)]
    assert borders[9] == 1600
    assert all(abs(border - 1600 * t / 9) <= 16 for t, border in enumerate(borders[:10]))


def test_shares_of_the_channels_are_added_up_for_every_number_of_rows() -> None:
    for rows in (1, 8):
        operands = operands_of(draw(rows, 67), draw(67, 40, seed=1), 0.1)
        result = compute(operands)
        expected = exact_result(operands, operands.weight.double())
        assert_as_precise_as_torch(result, torch_result(operands), expected)
