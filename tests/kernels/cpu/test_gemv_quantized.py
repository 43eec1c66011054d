import pytest
import torch

from teal.kernels.operands import Operands
from teal.quantization import QuantizedWeight
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw
from tests.kernels.cpu.cases import (
    DTYPES,
    SCHEMES,
    exact_result,
    parts,
    quant_params,
    quantized,
    schemes,
    torch_result,
)
from tests.pairwise import by_pairs

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import compute_quantized as compute


def _assert_parts_precise(operands: Operands, weight: QuantizedWeight) -> None:
    expected = exact_result(operands, weight.dequantize(torch.float64))
    by_torch = torch_result(operands._replace(weight=weight.dequantize(operands.x.dtype)))
    product = compute(operands._replace(weight=weight.codes), quant_params(weight))
    assert_as_precise_as_torch(product, by_torch, expected)


@by_pairs(
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


@by_pairs(
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
