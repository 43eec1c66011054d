import numpy as np
import pytest
import torch

from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw
from tests.kernels.cpu.cases import (
    SCHEMES,
    exact_result,
    operands_of,
    quant_params,
    quantized,
    schemes,
    torch_result,
)

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import compute_quantized as compute
from teal.kernels.cpu.quantized_kernel import TILE, read_zeros
from teal.kernels.cpu.simd import NIBBLE_BASE


@schemes
def test_every_code_is_multiplied_as_what_it_stands_for(scheme: str) -> None:
    how = SCHEMES[scheme]
    every = torch.arange(256, dtype=torch.uint8)
    if how.format == "fp8":
        # NaN codes stand for nothing.
        every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    codes = every.view(torch.int8)[None] if how.format == "int8" else every[None]
    columns = 2 * codes.shape[1] if how.format == "int4" else codes.shape[1]
    zeros = None if how.symmetric else torch.full((1, columns), 3, dtype=torch.uint8)
    weight = QuantizedWeight(codes=codes, scales=torch.ones(1, columns), group_size=1, zeros=zeros)
    product = compute(operands_of(torch.ones(1), codes, 0.0, columns), quant_params(weight))
    assert torch.equal(product, weight.dequantize()[0])


@schemes
def test_codes_of_dropped_channels_are_never_used(scheme: str) -> None:
    x, weight = draw(200), quantized(scheme, (200, 71), torch.float32)
    operands, quant = operands_of(x, weight.codes, 0.6, 71), quant_params(weight)
    product = compute(operands, quant)
    spoilt = weight.codes.view(torch.uint8).clone()
    spoilt[~reference.keep_mask(x, 0.6)] = 0x55
    again = compute(operands._replace(weight=spoilt.view(weight.codes.dtype)), quant)
    assert torch.equal(again, product)


@schemes
@pytest.mark.parametrize("output_sizes", [(TILE + 3,), (7, TILE + 1)], ids=str)
def test_columns_beyond_one_tile_are_as_precise_as_torch(
    scheme: str, output_sizes: tuple[int, ...]
) -> None:
    weight = quantized(scheme, (150, sum(output_sizes)), torch.float32)
    operands = operands_of(draw(150), weight.codes, 0.4, weight.out_features)._replace(
        output_sizes=output_sizes, thresholds=[0.4, 0.8][: len(output_sizes)]
    )
    expected = exact_result(operands, weight.dequantize(torch.float64))
    by_torch = torch_result(operands._replace(weight=weight.dequantize()))
    assert_as_precise_as_torch(compute(operands, quant_params(weight)), by_torch, expected)


@pytest.mark.parametrize("columns, first_byte", [(8, 0), (8, 2), (9, 0), (9, 3)])
def test_zeros_are_read_in_the_form_of_nibbles(columns: int, first_byte: int) -> None:
    own = np.arange(1, columns + 1, dtype=np.uint8)
    zeros = np.zeros((2, (columns + 1) // 2 - first_byte), np.float32)
    read_zeros(zeros, own, first_byte)
    low, high = own[2 * first_byte :: 2], own[2 * first_byte + 1 :: 2]
    assert (zeros[0] == np.float32(NIBBLE_BASE) + low).all()
    # An odd number of columns leaves the last upper nibble without a meaning.
    assert (zeros[1, : len(high)] == np.float32(NIBBLE_BASE) + 16 * high.astype(np.float32)).all()
