import pytest
import torch

from tests.kernels.cases import draw
from tests.kernels.cpu.cases import (
    DTYPES,
    SCHEMES,
    dtypes,
    operands_of,
    quant_params,
    quantized,
)
from tests.pairwise import by_pairs

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import dequantized


@by_pairs(dtype=DTYPES, scheme=list(SCHEMES), shape=[(129, 64), (700, 257)], threads=[1, 2])
def test_floats_have_the_bits_of_the_reference(
    dtype: torch.dtype, scheme: str, shape: tuple[int, int], threads: int, two_threads: None
) -> None:
    torch.set_num_threads(threads)
    weight = quantized(scheme, shape, dtype)
    operands = operands_of(draw(9, shape[0], dtype=dtype), weight.codes, 0.5, shape[1])
    assert torch.equal(dequantized(operands, quant_params(weight)), weight.dequantize(dtype))


@dtypes
def test_last_group_may_be_shorter(dtype: torch.dtype) -> None:
    weight = quantized("int4 with zeros", (65, 7), dtype)
    operands = operands_of(draw(9, 65, dtype=dtype), weight.codes, 0.5, 7)
    assert len(weight.scales) == 2
    assert torch.equal(dequantized(operands, quant_params(weight)), weight.dequantize(dtype))
