import pytest
import torch

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.tile_config import can_load
from teal.kernels.operands import QuantParams

FLOATS = torch.zeros(256, 64, dtype=torch.bfloat16)
INT8 = torch.zeros(256, 64, dtype=torch.int8)
INT4 = torch.zeros(256, 32, dtype=torch.uint8)


def quant(rows: int, group_size: int, dtype: torch.dtype = torch.bfloat16) -> QuantParams:
    return QuantParams(torch.ones(rows, 64, dtype=dtype), None, group_size)


@pytest.mark.parametrize(
    ("weight", "scales", "output_sizes", "can"),
    [
        (FLOATS, None, [40, 24], True),
        (FLOATS, None, [44, 20], False),
        (FLOATS.half(), None, [64], False),
        (INT8, quant(1, 256), [48, 16], True),
        (INT8, quant(1, 256), [40, 24], False),
        # Codes of 8 bits have one scale per column.
        (INT8, quant(2, 128), [64], False),
        (INT4, quant(2, 128), [48, 16], True),
        (INT4, quant(16, 16), [64], False),
        (INT4, quant(2, 128, torch.float64), [64], False),
        (INT4.flatten()[32:].view(-1, 32)[:, :32].t().contiguous().t(), quant(2, 128), [64], False),
    ],
)
def test_format_width_and_layout_decide_whether_a_weight_can_be_loaded(
    weight: torch.Tensor, scales: QuantParams | None, output_sizes: list[int], can: bool
) -> None:
    assert can_load(weight, scales, output_sizes, torch.bfloat16) is can


def test_weights_have_to_be_aligned_to_16_bytes() -> None:
    shifted = torch.zeros(256 * 64 + 4, dtype=torch.bfloat16)[4:].view(256, 64)
    assert not can_load(shifted, None, [64], torch.bfloat16)
