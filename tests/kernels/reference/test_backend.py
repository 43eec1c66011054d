import math

import pytest
import torch
from torch import Tensor

from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import backend
from teal.kernels.reference.backend import ReferenceBackend, multiply
from teal.kernels.reference.quantized import dequantized, quantized_gemv
from teal.quantization import Scheme, round_to_nearest
from tests.helpers import relative_error
from tests.kernels.cases import draw

TINY = 2e-6
SCHEMES = {
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(format="int4", group_size=32),
    "int4 with zeros": Scheme(format="int4", group_size=32, symmetric=False),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def _operands(scheme: Scheme, output_sizes: list[int]) -> tuple[Operands, QuantParams]:
    weight = round_to_nearest(draw(70, sum(output_sizes), seed=1), scheme)
    operands = Operands(draw(2, 70), weight.codes, [0.5, 0.7], output_sizes)
    return operands, QuantParams(weight.scales, weight.zeros, weight.group_size)


def test_there_is_nothing_that_the_reference_refuses() -> None:
    operands = Operands(draw(0, 3).double(), draw(3, 2).double(), [0.5], [2])
    assert ReferenceBackend().can_run(operands, None) is None
    assert ReferenceBackend().run(operands, None).shape == (0, 2)


@schemes
@pytest.mark.parametrize("output_sizes", [[32, 64], [33, 63]], ids=str)
def test_each_part_of_a_quantized_weight_has_its_own_threshold(
    scheme: Scheme, output_sizes: list[int]
) -> None:
    operands, quant = _operands(scheme, output_sizes)
    exact = [
        quantized_gemv(operands.x, operands.weight, *quant, threshold, accumulate=torch.float64)
        for threshold in operands.thresholds
    ]
    first = output_sizes[0]
    expected = torch.cat([exact[0][:, :first], exact[1][:, first:]], dim=-1)
    assert relative_error(multiply(operands, quant), expected) < TINY


@schemes
@pytest.mark.parametrize("output_sizes", [[32, 64], [33, 63]], ids=str)
def test_few_columns_of_a_quantized_weight_are_floats_at_a_time(
    scheme: Scheme, output_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    operands, quant = _operands(scheme, output_sizes)
    at_once = multiply(operands, quant)
    sizes: list[int] = []

    def counted(
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        group_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        floats = dequantized(codes, scales, zeros, group_size, dtype)
        sizes.append(floats.numel())
        return floats

    monkeypatch.setattr(backend, "dequantized", counted)
    monkeypatch.setattr(backend, "_MOST_FLOATS", 70 * 7)
    assert relative_error(multiply(operands, quant), at_once) < TINY
    # Two columns of int4 share a byte, so one more may be read.
    assert max(sizes) <= 70 * 8
    assert len(sizes) == sum(math.ceil(width / 7) for width in output_sizes)
