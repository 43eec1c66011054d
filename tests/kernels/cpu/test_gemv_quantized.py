import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.kernels.operands import Operands
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw
from tests.kernels.cpu.cases import (
    DTYPES,
    SCHEMES,
    exact_result,
    operands_of,
    pairwise,
    parts,
    quant_params,
    quantized,
    schemes,
    torch_result,
)

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import compute_quantized as compute


def _product(x: Tensor, weight: QuantizedWeight, threshold: float, **vectors: Any) -> Tensor:
    return compute(_operands(x, weight, threshold, **vectors), quant_params(weight))


def _operands(x: Tensor, weight: QuantizedWeight, threshold: float, **vectors: Any) -> Operands:
    return operands_of(x, weight.codes, threshold, weight.out_features, **vectors)


def _rounded_once(operands: Operands, weight: QuantizedWeight) -> Tensor:
    """Multiply as torch does with the weight in float32, and round once."""
    kept = reference.sparse_activation(operands.x, operands.thresholds[0])
    product = kept.float() @ weight.dequantize()
    bias = operands.bias
    return (product if bias is None else product + bias.float()).to(operands.x.dtype)


def _assert_precise(
    x: Tensor, weight: QuantizedWeight, threshold: float, **vectors: Tensor
) -> None:
    operands = _operands(x, weight, threshold, **vectors)
    product = compute(operands, quant_params(weight))
    expected = exact_result(operands, weight.dequantize(torch.float64))
    assert product.shape == expected.shape
    assert_as_precise_as_torch(product, _rounded_once(operands, weight), expected)


@pairwise(
    dtype=DTYPES,
    scheme=list(SCHEMES),
    rows=[(), (2, 1), (8,)],
    shape=[(63, 129), (700, 64), (4097, 9)],
    given=["nothing", "bias"],
)
def test_product_is_as_precise_as_torch_on_the_dequantized_weight(
    dtype: torch.dtype, scheme: str, rows: tuple[int, ...], shape: tuple[int, int], given: str
) -> None:
    vectors = {"bias": draw(shape[1], dtype=dtype, seed=2)} if given == "bias" else {}
    x = draw(*rows, shape[0], dtype=dtype)
    _assert_precise(x, quantized(scheme, shape, dtype), 0.4, **vectors)


@schemes
def test_scales_may_have_another_dtype_than_the_activations(scheme: str) -> None:
    weight = quantized(scheme, (130, 70), torch.float16)
    _assert_precise(draw(2, 130, dtype=torch.bfloat16), weight, 0.4)


@schemes
def test_all_weights_of_one_output_may_share_a_scale(scheme: str) -> None:
    weight = quantized(scheme, (130, 71), torch.float32)
    zeros = None if weight.zeros is None else weight.zeros[:1]
    shared = QuantizedWeight(
        codes=weight.codes, scales=weight.scales[:1], group_size=130, zeros=zeros
    )
    _assert_precise(draw(3, 130), shared, 0.4)


@schemes
def test_negative_threshold_is_dense(scheme: str) -> None:
    _assert_precise(draw(2, 130), quantized(scheme, (130, 71), torch.float32), -1.0)


@schemes
@pytest.mark.parametrize("visible", [math.nan, math.inf])
def test_nan_and_inf_in_one_row_stay_visible_there_and_only_there(
    scheme: str, visible: float
) -> None:
    x, weight = draw(3, 130), quantized(scheme, (130, 70), torch.float32)
    x[1, 77] = visible
    product = _product(x, weight, 0.5)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


@schemes
def test_everything_dropped_leaves_bias_and_residual(scheme: str) -> None:
    weight, bias, residual = quantized(scheme, (130, 71), torch.float32), draw(71), draw(2, 71)
    product = _product(draw(2, 130), weight, math.inf, bias=bias, residual=residual)
    assert torch.equal(product, bias + residual)


def _assert_parts_precise(operands: Operands, weight: QuantizedWeight) -> None:
    expected = exact_result(operands, weight.dequantize(torch.float64))
    by_torch = torch_result(operands._replace(weight=weight.dequantize(operands.x.dtype)))
    product = compute(operands._replace(weight=weight.codes), quant_params(weight))
    assert_as_precise_as_torch(product, by_torch, expected)


@pairwise(
    dtype=DTYPES,
    scheme=list(SCHEMES),
    rows=[1, 3],
    output_sizes=[(129,), (301, 20, 21), (1, 128, 1)],
)
def test_parts_have_masks_of_their_own_and_take_norm_shift_bias_and_residual(
    dtype: torch.dtype, scheme: str, rows: int, output_sizes: tuple[int, ...], two_threads: None
) -> None:
    columns = sum(output_sizes)
    residual = 20 * draw(rows, columns, dtype=dtype, seed=6)
    operands = parts(dtype, rows, output_sizes, in_features=300, residual=residual)
    _assert_parts_precise(operands, quantized(scheme, (300, columns), dtype))


@pairwise(
    dtype=DTYPES,
    scheme=list(SCHEMES),
    rows=[1, 3],
    activation=["silu", "gelu_pytorch_tanh"],
    half=[64, 333],
)
def test_gate_and_up_are_as_precise_as_torch(
    dtype: torch.dtype, scheme: str, rows: int, activation: str, half: int, two_threads: None
) -> None:
    operands = parts(dtype, rows, (half, half), in_features=300, activation=activation)
    _assert_parts_precise(operands, quantized(scheme, (300, 2 * half), dtype))


@schemes
@pytest.mark.parametrize("rows", [1, 5])
def test_bits_do_not_depend_on_the_number_of_threads(
    scheme: str, rows: int, two_threads: None
) -> None:
    weight = quantized(scheme, (300, 1200), torch.bfloat16)
    changes = {"in_features": 300, "thresholds": [0.0, 5.0], "weight": weight.codes}
    forms = [
        parts(torch.bfloat16, rows, (701, 499), **changes),
        parts(torch.bfloat16, rows, (600, 600), activation="silu", **changes),
    ]
    quant = quant_params(weight)
    by_two = [compute(operands, quant) for operands in forms]
    torch.set_num_threads(1)
    assert all(map(torch.equal, by_two, [compute(operands, quant) for operands in forms]))
