import pytest
import torch
from torch import Tensor

from teal.engine.weights.matrix import fold_shift, head_product, weight_rows
from teal.quantization import Scheme, round_to_nearest
from tests.helpers import relative_error

SCHEMES = [Scheme(format="int8"), Scheme(format="fp8"), Scheme(format="int4", group_size=32)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.format)

# Rounding error of sums in float32.
TINY = 2e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@schemes
def test_quantized_head_gives_the_logits_of_its_values(scheme: Scheme) -> None:
    head, hidden = round_to_nearest(draw(70, 97), scheme), draw(2, 70, seed=1)
    rows = head.dequantize().t().contiguous()
    assert relative_error(head_product(hidden, head), head_product(hidden, rows)) < TINY


@schemes
def test_folded_shift_of_a_quantized_weight_is_that_of_its_values(scheme: Scheme) -> None:
    weight, shift, bias = round_to_nearest(draw(70, 96), scheme), draw(70, seed=1), draw(96, seed=2)
    folded = fold_shift(weight, shift, bias, torch.bfloat16)
    assert folded.dtype == torch.bfloat16
    expected = bias + shift @ weight.dequantize()
    assert relative_error(folded, expected) < torch.finfo(torch.bfloat16).eps


@schemes
def test_there_is_one_row_per_input_channel(scheme: Scheme) -> None:
    dense = draw(70, 96)
    assert weight_rows(dense) is dense
    assert len(weight_rows(round_to_nearest(dense, scheme))) == 70
