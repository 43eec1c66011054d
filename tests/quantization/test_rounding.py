import pytest
import torch

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


def dense(shape=(96, 40), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@every_scheme
def test_a_rounded_weight_has_shape_and_format_of_what_was_asked_for(name):
    weight = round_to_nearest(dense(), SCHEMES[name])
    assert weight.shape == (96, 40)
    assert weight.format == SCHEMES[name].format
    assert weight.group_size == (SCHEMES[name].group_size or 96)
    assert (weight.zeros is not None) == (not SCHEMES[name].symmetric)


@pytest.mark.parametrize(
    ("name", "most"), [("fp8", 0.03), ("int4", 0.11), ("int4-asymmetric", 0.09), ("int8", 0.008)]
)
def test_rounding_normal_numbers_errs_as_its_bits_let_expect(name, most):
    weight = round_to_nearest(dense(), SCHEMES[name])
    assert most / 3 < relative_error(weight.dequantize(), dense()) < most


@pytest.mark.parametrize("name", ["int4-asymmetric", "int8"])
def test_no_entry_is_further_than_half_a_step_from_its_value(name):
    weight = round_to_nearest(dense(), SCHEMES[name])
    steps = weight.scales.repeat_interleave(weight.group_size, 0)
    # A zero that is not on the quantization parameters moves the ends of the range by up to
    # another half step.
    most = 1.0 if name == "int4-asymmetric" else 0.5
    assert ((weight.dequantize() - dense()).abs() <= most * steps + 1e-6).all()


def test_values_on_the_grid_are_not_changed():
    integers = torch.randint(-127, 128, (96, 40), generator=torch.Generator().manual_seed(0))
    integers[0] = 127
    on_the_grid = integers.float() * 0.25
    assert torch.equal(round_to_nearest(on_the_grid, SCHEMES["int8"]).dequantize(), on_the_grid)


@every_scheme
def test_a_weight_of_zeros_stays_zero(name):
    weight = round_to_nearest(torch.zeros(96, 40), SCHEMES[name])
    assert (weight.dequantize() == 0).all()


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scales_take_the_dtype_of_the_weight_and_codes_make_up_for_their_rounding(name, dtype):
    weight = round_to_nearest(dense(dtype=dtype), SCHEMES[name])
    in_full = round_to_nearest(dense(dtype=dtype).float(), SCHEMES[name])
    exact = dense(dtype=dtype)
    assert weight.scales.dtype == dtype
    by_rounded_scales = relative_error(weight.dequantize(), exact)
    assert by_rounded_scales < 1.1 * relative_error(in_full.dequantize(), exact)


@every_scheme
def test_what_lies_beyond_the_grid_gets_the_value_at_its_end(name):
    quantizer = GroupQuantizer.fit(dense(), SCHEMES[name], torch.float32)
    ends = quantizer.values(
        quantizer.codes(torch.stack([dense().amin(0) - 9, dense().amax(0) + 9]))
    )
    beyond = quantizer.values(
        quantizer.codes(torch.stack([dense().amin(0) - 999, dense().amax(0) + 999]))
    )
    assert torch.equal(beyond, ends)
    assert torch.isfinite(beyond).all()


def test_a_last_group_may_be_shorter():
    weight = round_to_nearest(dense((70, 6)), SCHEMES["int4"])
    assert weight.scales.shape == (3, 6)
    alone = round_to_nearest(dense((70, 6))[64:], Scheme(format="int4", group_size=32))
    assert torch.equal(weight.dequantize()[64:], alone.dequantize())


def test_groups_of_unlike_size_are_scaled_apart():
    weight = dense()
    weight[32:64] *= 1000
    rounded = round_to_nearest(weight, SCHEMES["int4"]).dequantize()
    assert relative_error(rounded[:32], weight[:32]) < 0.12


def test_int4_takes_groups_of_128_where_none_are_given():
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
def test_what_cannot_be_made_is_refused_with_what_can(fields, words):
    with pytest.raises(UserError, match=words):
        Scheme(**fields)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_with_nan_or_inf_is_refused(bad):
    weight = dense()
    weight[3, 3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        round_to_nearest(weight, SCHEMES["int8"])
