import pytest
import torch

from teal.kernels.operands import Operands
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw
from tests.kernels.cpu.cases import (
    assert_precise,
    exact_result,
    operands_of,
    parts,
    quant_params,
    quantized,
    schemes,
    torch_result,
)

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import NumbaBackend

NUMBA = NumbaBackend()


def _operands(rows: int = 1, dtype: torch.dtype = torch.float32) -> Operands:
    return operands_of(draw(rows, 130, dtype=dtype), draw(130, 71, dtype=dtype, seed=1), 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 8])
def test_up_to_eight_rows_of_float32_and_16_bit_floats_can_run(
    dtype: torch.dtype, rows: int
) -> None:
    assert NUMBA.can_run(_operands(rows, dtype), None) is None


def test_other_dtypes_more_rows_and_more_parts_are_refused_with_the_reason() -> None:
    assert NUMBA.can_run(_operands(dtype=torch.float64), None) == (
        "x is float64, not float32, bfloat16 or float16"
    )
    assert NUMBA.can_run(_operands(rows=9), None) == "x has more than 8 rows: torch is faster"
    four = _operands()._replace(thresholds=[0.4] * 4, output_sizes=[20, 20, 20, 11])
    assert NUMBA.can_run(four, None) == "there are more than 3 parts"


@schemes
def test_quantized_weights_that_kernels_cannot_read_are_refused_with_the_reason(
    scheme: str,
) -> None:
    weight = quantized(scheme, (130, 72), torch.float32)
    quant = quant_params(weight)
    operands = operands_of(draw(130), weight.codes, 0.4, 72)
    assert NUMBA.can_run(operands, quant) is None
    apart = operands._replace(weight=weight.codes[:, ::2])
    assert NUMBA.can_run(apart, quant) == "codes are not contiguous"
    apart_scales = quant._replace(scales=quant.scales[:, ::2])
    assert NUMBA.can_run(operands, apart_scales) == "scales are not contiguous"
    wide = quant._replace(scales=quant.scales.double())
    assert NUMBA.can_run(operands, wide) == "scales are float64, not float32, bfloat16 or float16"
    if quant.zeros is not None:
        apart_zeros = quant._replace(zeros=quant.zeros[:, ::2])
        assert NUMBA.can_run(operands, apart_zeros) == "zeros are not contiguous"


def test_a_float_product_is_as_precise_as_torch() -> None:
    operands = _operands(rows=2)
    assert_precise(NUMBA.run(operands, None), operands)


@schemes
@pytest.mark.parametrize("rows", [2, 9])
def test_a_quantized_product_of_any_number_of_rows_is_as_precise_as_torch(
    scheme: str, rows: int
) -> None:
    weight = quantized(scheme, (130, 71), torch.float32)
    quant = quant_params(weight)
    operands = operands_of(draw(rows, 130), weight.codes, 0.4, 71)
    assert NUMBA.can_run(operands, quant) is None
    expected = exact_result(operands, weight.dequantize(torch.float64))
    by_torch = torch_result(operands._replace(weight=weight.dequantize()))
    assert_as_precise_as_torch(NUMBA.run(operands, quant), by_torch, expected)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_nine_rows_of_a_quantized_weight_have_the_bits_of_the_reference(
    activation: str | None,
) -> None:
    weight = quantized("int4 with zeros", (300, 96), torch.bfloat16)
    operands = parts(torch.bfloat16, 9, (48, 48), in_features=300, activation=activation)
    if activation is None:
        operands = operands._replace(residual=draw(9, 96, dtype=torch.bfloat16))
    product = NUMBA.run(operands._replace(weight=weight.codes), quant_params(weight))
    dense = operands._replace(weight=weight.dequantize(torch.bfloat16))
    assert torch.equal(product, torch_result(dense))
