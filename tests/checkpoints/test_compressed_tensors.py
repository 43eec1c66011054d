from typing import Any

import pytest
import torch
from torch import Tensor

from teal.checkpoints.compressed_tensors import (
    CompressedLayout,
    compressed_config,
    compressed_tensors,
)
from teal.foundation.errors import UserError
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest
from tests.quantization import packers
from tests.quantization.packers import IN, OUT, int_weights, packed_tensors, random_codes, symmetric

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
INT8_PER_OUTPUT = int_weights(8, strategy="channel", group_size=None)
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
SCHEMES = {
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(format="int4", group_size=32),
    "int4-asymmetric": Scheme(format="int4", group_size=32, symmetric=False),
    "int8": Scheme(format="int8"),
}


def read(
    tensors: dict[str, Tensor],
    weights: dict[str, Any],
    layout: str = PACKED,
    name: str = "model.layers.0.mlp.up_proj",
    **changes: Any,
) -> QuantizedWeight:
    config = packers.compressed_config(weights, layout, **changes)
    return CompressedLayout.from_config(config).weight(name, tensors)


def plain_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-99, 99, (OUT, IN), generator=generator)
    return {
        "weight": codes.to(dtype),
        "weight_scale": 0.1 + torch.rand(OUT, 1, generator=generator),
    }


def test_packed_int4_weights_equal_those_of_the_specification() -> None:
    codes = symmetric(random_codes())
    weight = read(packed_tensors(codes), int_weights())
    assert weight.zeros is None
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


def test_packed_int4_weights_with_zeros_equal_those_of_the_specification() -> None:
    codes = random_codes()
    weight = read(packed_tensors(codes, has_zeros=True), int_weights(symmetric=False))
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


def test_packed_int8_weights_equal_those_of_the_specification() -> None:
    codes = symmetric(random_codes(8, group_size=IN), 8)
    weight = read(packed_tensors(codes, bits=8), INT8_PER_OUTPUT)
    assert weight.format == "int8"
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


@pytest.mark.parametrize(
    ("dtype", "weights", "layout"),
    [
        pytest.param(torch.int8, INT8_PER_OUTPUT, INT, id="int8"),
        pytest.param(torch.int8, INT8_PER_OUTPUT, "naive-quantized", id="naive"),
        pytest.param(torch.float8_e4m3fn, FP8, FLOAT, id="fp8"),
    ],
)
def test_plain_codes_dequantize_to_code_times_scale(
    dtype: torch.dtype, weights: dict[str, Any], layout: str
) -> None:
    tensors = plain_tensors(dtype)
    weight = read(tensors, weights, layout)
    expected = tensors["weight"].float() * tensors["weight_scale"]
    assert weight.codes.dtype == dtype
    assert torch.equal(weight.dequantize(), expected.T)


def test_one_scale_per_tensor_applies_to_every_output() -> None:
    tensors = {**plain_tensors(torch.float8_e4m3fn), "weight_scale": torch.tensor([0.5])}
    weight = read(tensors, {**FP8, "strategy": "tensor"}, FLOAT)
    assert torch.equal(weight.dequantize(), tensors["weight"].T.float() * 0.5)


def test_activation_quantization_is_ignored() -> None:
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    weight = read(plain_tensors(torch.float8_e4m3fn), FP8, FLOAT, input_activations=activations)
    assert weight.format == "fp8"


@pytest.mark.parametrize(
    "targets",
    [["Linear"], ["model.layers.0.mlp.up_proj"], [r"re:.*mlp\..*_proj$"]],
    ids=["class", "name", "pattern"],
)
def test_groups_cover_projections_by_class_name_and_pattern(targets: list[str]) -> None:
    codes = symmetric(random_codes())
    assert read(packed_tensors(codes), int_weights(), targets=targets).shape == (IN, OUT)


def test_each_projection_is_read_with_the_group_that_covers_it() -> None:
    config = packers.compressed_config(int_weights(), PACKED, targets=["re:.*mlp.*"])
    other = {"targets": ["re:.*attn.*"], "weights": FP8, "format": FLOAT}
    config["config_groups"]["group_1"] = other
    layout = CompressedLayout.from_config(config)
    up = layout.weight("layers.0.mlp.up_proj", packed_tensors(symmetric(random_codes())))
    q = layout.weight("layers.0.self_attn.q_proj", plain_tensors(torch.float8_e4m3fn))
    assert (up.format, q.format) == ("int4", "fp8")


def test_projection_that_no_group_covers_is_refused() -> None:
    with pytest.raises(UserError, match="No config group covers"):
        read(packed_tensors(random_codes()), int_weights(), targets=["re:.*attn.*"])


@pytest.mark.parametrize(
    ("weights", "layout", "words"),
    [
        pytest.param(int_weights(3), PACKED, "3 bits.*Supported", id="bits"),
        pytest.param({**FP8, "num_bits": 4}, "nvfp4-pack-quantized", "float.*4 bits", id="fp4"),
        pytest.param({**FP8, "strategy": "block"}, FLOAT, "per block", id="block"),
        pytest.param(int_weights(), INT, "'int-quantized'", id="int4 that is not packed"),
        pytest.param(int_weights(), "marlin-24", "'marlin-24'", id="format"),
        pytest.param(int_weights(actorder="group"), PACKED, "reordered", id="act-order"),
        pytest.param(
            {**INT8_PER_OUTPUT, "symmetric": False}, PACKED, "8-bit codes with zeros", id="zeros"
        ),
    ],
)
def test_unsupported_kinds_are_refused_with_the_supported_ones(
    weights: dict[str, Any], layout: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read({}, weights, layout)


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_truncated_tensors_are_refused(suffix: str) -> None:
    tensors = packed_tensors(random_codes(), has_zeros=True)
    tensors[suffix] = tensors[suffix][:-1]
    with pytest.raises(UserError, match=f"{suffix}.*damaged"):
        read(tensors, int_weights(symmetric=False))


def test_float_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"torch.float32, not quantized"):
        read(plain_tensors(torch.float32), FP8, FLOAT)


@pytest.mark.parametrize("name", SCHEMES)
def test_written_tensors_are_read_back_bit_for_bit(name: str) -> None:
    scheme = SCHEMES[name]
    dense = torch.randn(IN, OUT - 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = round_to_nearest(dense, scheme)
    layout = CompressedLayout.from_config(compressed_config(scheme, ["lm_head"]))
    again = layout.weight("p", compressed_tensors(weight, scheme))
    assert again.tensors().keys() == weight.tensors().keys()
    assert all(torch.equal(again.tensors()[n], t) for n, t in weight.tensors().items())


def test_symmetric_zeros_are_written_if_the_scheme_is_asymmetric() -> None:
    scheme = SCHEMES["int4-asymmetric"]
    codes = symmetric(random_codes())
    weight = read(packed_tensors(codes), int_weights())
    tensors = compressed_tensors(weight, scheme)
    expected = packed_tensors(codes, has_zeros=True)
    assert torch.equal(tensors["weight_zero_point"], expected["weight_zero_point"])


@pytest.mark.parametrize("name", SCHEMES)
def test_the_compressed_tensors_library_reads_the_same_values(name: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = SCHEMES[name]
    dense = torch.randn(IN, OUT, generator=torch.Generator().manual_seed(0))
    weight = round_to_nearest(dense, scheme)
    config = quantization.QuantizationConfig(**compressed_config(scheme, []))
    compressor = compressors.BaseCompressor.get_value_from_registry(config.format)
    group = config.config_groups["group_0"]
    theirs = compressor.decompress(compressed_tensors(weight, scheme), group)["weight"]
    assert torch.equal(theirs, weight.dequantize().T)
