from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal.foundation.errors import UserError
from teal.quantization import QuantizedWeight, side_by_side
from tests.quantization.packers import random_codes

FP8 = torch.float8_e4m3fn


def int8_weight(**changes: Any) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    fields = {
        "codes": torch.randint(-128, 128, (64, 5), generator=generator, dtype=torch.int8),
        "scales": 0.1 + torch.rand(1, 5, generator=generator),
        "group_size": 64,
    }
    return QuantizedWeight(**{**fields, **changes})


def fp8_weight() -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(64, 6, generator=generator).to(FP8)
    return QuantizedWeight(codes=codes, scales=torch.full((1, 6), 0.25), group_size=64)


def int4_weight(
    shape: tuple[int, int] = (64, 6), group_size: int = 32, has_zeros: bool = True
) -> QuantizedWeight:
    drawn = random_codes(shape=shape, group_size=group_size)
    zeros = drawn.zeros.to(torch.uint8) if has_zeros else None
    return QuantizedWeight.of_int4(drawn.unsigned.to(torch.uint8), drawn.scales, group_size, zeros)


WEIGHTS = {
    "fp8": fp8_weight,
    "int4": lambda: int4_weight(has_zeros=False),
    "int4-odd": lambda: int4_weight((64, 7)),
    "int4-zeros": int4_weight,
    "int8": int8_weight,
}

every_weight = pytest.mark.parametrize("name", WEIGHTS)


@every_weight
def test_weight_reports_its_format_and_shape(name: str) -> None:
    weight = WEIGHTS[name]()
    assert weight.format == name.split("-")[0]
    assert weight.shape == (weight.in_features, weight.out_features) == (64, weight.scales.shape[1])


@every_weight
def test_codes_of_an_input_channel_are_contiguous(name: str) -> None:
    weight = WEIGHTS[name]()
    assert weight.codes.is_contiguous()
    assert len(weight.codes) == weight.in_features


def test_int4_takes_half_a_byte_per_weight_plus_scales_and_zeros() -> None:
    weight = int4_weight((64, 6), 32)
    assert weight.bytes == 64 * 3 + 2 * 6 * 2 + 2 * 6


@every_weight
def test_saved_tensors_are_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    weight = WEIGHTS[name]()
    save_file(weight.tensors(), tmp_path / "weight.safetensors")
    again = QuantizedWeight.from_tensors(
        load_file(tmp_path / "weight.safetensors"), weight.group_size
    )
    assert again.tensors().keys() == weight.tensors().keys()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_moving_a_weight_keeps_every_bit() -> None:
    weight = int4_weight()
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())


@pytest.mark.parametrize("shape", [(64, 6), (64, 7), (70, 5)], ids=str)
def test_dequantized_int4_is_code_minus_zero_times_scale(shape: tuple[int, int]) -> None:
    drawn = random_codes(shape=shape)
    weight = int4_weight(shape)
    assert torch.equal(weight.dequantize(torch.float64), drawn.weight)


def test_dequantized_int8_is_code_times_scale() -> None:
    weight = int8_weight()
    assert torch.equal(weight.dequantize(), weight.codes.float() * weight.scales)


def test_dequantized_fp8_is_code_times_scale() -> None:
    weight = fp8_weight()
    assert torch.equal(weight.dequantize(), weight.codes.float() * 0.25)


def test_dequantizing_to_bfloat16_rounds_once() -> None:
    weight = int4_weight()
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize().bfloat16())


def test_zeros_that_all_equal_the_middle_code_are_dropped() -> None:
    drawn = random_codes()
    zeros = torch.full(drawn.zeros.shape, 8, dtype=torch.uint8)
    weight = QuantizedWeight.of_int4(drawn.unsigned.to(torch.uint8), drawn.scales, 32, zeros)
    assert weight.zeros is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"codes": torch.zeros(64, 5)}, "codes in one of", id="float codes"),
        pytest.param({"codes": torch.zeros(64, dtype=torch.int8)}, "two dimensions", id="vector"),
        pytest.param({"scales": torch.ones(5)}, "two dimensions", id="scales without groups"),
        pytest.param({"group_size": 16}, "Group size 16 is not supported", id="group size"),
        pytest.param({"group_size": 0}, "Group size 0 is not supported", id="no group"),
        pytest.param({"group_size": 32}, "each of 2 groups", id="too few scales"),
        pytest.param({"scales": torch.ones(1, 4)}, "do not fit", id="too few outputs"),
        pytest.param({"scales": torch.zeros(1, 5)}, "Scales hold zero", id="zero scales"),
        pytest.param({"scales": torch.full((1, 5), torch.nan)}, "NaN", id="NaN scales"),
        pytest.param(
            {"zeros": torch.zeros(1, 5, dtype=torch.uint8)}, "int4 alone", id="zeros of int8"
        ),
    ],
)
def test_mismatched_fields_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        int8_weight(**changes)


def test_zeros_of_another_shape_than_scales_are_refused() -> None:
    weight = int4_weight()
    with pytest.raises(UserError, match="Zeros are"):
        QuantizedWeight(
            codes=weight.codes, scales=weight.scales, group_size=32, zeros=weight.zeros[:1]
        )


@every_weight
def test_joined_weights_have_the_same_values(name: str) -> None:
    weight = WEIGHTS[name]()
    joined = side_by_side([weight, weight, weight])
    assert joined.format == weight.format
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize()] * 3, dim=1))


def test_weights_with_and_without_zeros_can_be_joined() -> None:
    pair = [int4_weight((64, 5), has_zeros=False), int4_weight((64, 6))]
    joined = side_by_side(pair)
    assert torch.equal(joined.dequantize(), torch.cat([w.dequantize() for w in pair], dim=1))


def test_weights_of_different_formats_cannot_be_joined() -> None:
    with pytest.raises(UserError, match="int4 of 64 inputs in groups of 32, int8"):
        side_by_side([int4_weight(), int8_weight()])
