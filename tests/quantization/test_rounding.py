from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.quantization import Scheme, round_to_nearest
from teal.quantization.rounding import GroupQuantizer
from tests.helpers import relative_error

SCHEMES = {
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(format="int4", group_size=32),
    "int4-asymmetric": Scheme(format="int4", group_size=32, symmetric=False),
    "int8": Scheme(format="int8"),
}

every_scheme = pytest.mark.parametrize("name", SCHEMES)


def dense(shape: tuple[int, int] = (96, 40), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@every_scheme
def test_rounded_weight_has_the_shape_of_the_input_and_the_format_of_the_scheme(name: str) -> None:
    weight = round_to_nearest(dense(), SCHEMES[name])
    assert weight.shape == (96, 40)
    assert weight.format == SCHEMES[name].format
    assert weight.group_size == (SCHEMES[name].group_size or 96)
    assert (weight.zeros is not None) == (not SCHEMES[name].symmetric)


@pytest.mark.parametrize(
    ("name", "most"), [("fp8", 0.03), ("int4", 0.11), ("int4-asymmetric", 0.09), ("int8", 0.008)]
)
def test_rounding_error_of_normal_weights_fits_the_number_of_bits(name: str, most: float) -> None:
    weight = round_to_nearest(dense(), SCHEMES[name])
    assert most / 3 < relative_error(weight.dequantize(), dense()) < most


@pytest.mark.parametrize("name", ["int4-asymmetric", "int8"])
def test_error_of_each_entry_is_at_most_half_a_step(name: str) -> None:
    weight = round_to_nearest(dense(), SCHEMES[name])
    steps = weight.scales.repeat_interleave(weight.group_size, 0)
    # Rounding the zero to a code moves the range by up to another half step.
    most = 1.0 if name == "int4-asymmetric" else 0.5
    assert ((weight.dequantize() - dense()).abs() <= most * steps + 1e-6).all()


def test_representable_values_are_not_changed() -> None:
    integers = torch.randint(-127, 128, (96, 40), generator=torch.Generator().manual_seed(0))
    integers[0] = 127
    representable = integers.float() * 0.25
    assert torch.equal(round_to_nearest(representable, SCHEMES["int8"]).dequantize(), representable)


@every_scheme
def test_zero_weight_stays_zero(name: str) -> None:
    weight = round_to_nearest(torch.zeros(96, 40), SCHEMES[name])
    assert (weight.dequantize() == 0).all()


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_have_the_dtype_of_the_weight_and_codes_compensate_their_rounding(
    name: str, dtype: torch.dtype
) -> None:
    weight = round_to_nearest(dense(dtype=dtype), SCHEMES[name])
    in_full = round_to_nearest(dense(dtype=dtype).float(), SCHEMES[name])
    exact = dense(dtype=dtype)
    assert weight.scales.dtype == dtype
    by_rounded_scales = relative_error(weight.dequantize(), exact)
    assert by_rounded_scales < 1.1 * relative_error(in_full.dequantize(), exact)


@every_scheme
def test_values_out_of_range_are_clamped(name: str) -> None:
    quantizer = GroupQuantizer.fit(dense(), SCHEMES[name], torch.float32)
    lowest, highest = dense().amin(0), dense().amax(0)

    def rounded(excess: float) -> Tensor:
        outside = torch.stack([lowest - excess, highest + excess])
        return quantizer.values(quantizer.codes(outside))

    assert torch.equal(rounded(999), rounded(9))
    assert torch.isfinite(rounded(999)).all()


def test_last_group_may_be_shorter() -> None:
    weight = round_to_nearest(dense((70, 6)), SCHEMES["int4"])
    assert weight.scales.shape == (3, 6)
    alone = round_to_nearest(dense((70, 6))[64:], Scheme(format="int4", group_size=32))
    assert torch.equal(weight.dequantize()[64:], alone.dequantize())


def test_each_group_has_a_scale_of_its_own() -> None:
    weight = dense()
    weight[32:64] *= 1000
    rounded = round_to_nearest(weight, SCHEMES["int4"]).dequantize()
    assert relative_error(rounded[:32], weight[:32]) < 0.12


def test_default_group_size_of_int4_is_128() -> None:
    assert Scheme(format="int4").group_size == 128


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"format": "int3"}, "Unknown format 'int3'.*fp8, int4, int8", id="format"),
        pytest.param({"format": "int4", "group_size": 48}, "48.*32, 64, 128", id="group size"),
        pytest.param({"format": "int8", "group_size": 64}, "one scale per output", id="int8 group"),
        pytest.param({"format": "fp8", "symmetric": False}, "no zeros", id="fp8 zeros"),
    ],
)
def test_unsupported_schemes_are_refused_with_the_supported_ones(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Scheme(**fields)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weight_with_nan_or_inf_is_refused(bad: float) -> None:
    weight = dense()
    weight[3, 3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        round_to_nearest(weight, SCHEMES["int8"])
