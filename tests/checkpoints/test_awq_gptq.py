from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.checkpoints.awq_gptq import AwqLayout, GptqLayout
from teal.foundation.errors import UserError
from teal.quantization import QuantizedWeight
from tests.quantization.packers import (
    IN,
    OUT,
    awq_config,
    awq_tensors,
    gptq_config,
    gptq_tensors,
    random_codes,
    symmetric,
)

Reader = Callable[..., QuantizedWeight]


def read_awq(tensors: dict[str, Tensor], **changes: Any) -> QuantizedWeight:
    return AwqLayout.from_config(awq_config(**changes)).weight("p", tensors)


def read_gptq(tensors: dict[str, Tensor], **changes: Any) -> QuantizedWeight:
    return GptqLayout.from_config(gptq_config(**changes)).weight("p", tensors)


def test_awq_weights_equal_those_of_the_specification() -> None:
    codes = random_codes()
    weight = read_awq(awq_tensors(codes))
    assert weight.shape == (IN, OUT)
    assert weight.scales.dtype == torch.float16
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_weights_equal_those_of_the_specification(version: int) -> None:
    codes = random_codes()
    checkpoint_format = "gptq" if version == 1 else "gptq_v2"
    weight = read_gptq(gptq_tensors(codes, version=version), checkpoint_format=checkpoint_format)
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


def test_gptq_without_a_named_format_is_version_1() -> None:
    codes = random_codes()
    assert torch.equal(read_gptq(gptq_tensors(codes)).dequantize(torch.float64), codes.weight)


def test_stored_gptq_zeros_of_15_wrap_around_to_0() -> None:
    codes = random_codes()
    codes.zeros[0, 0] = 0
    tensors = gptq_tensors(codes, version=2)
    tensors["qzeros"] = gptq_tensors(random_codes())["qzeros"].clone()
    tensors["qzeros"][0, 0] |= 0xF
    weight = read_gptq(tensors)
    assert weight.zeros[0, 0] == 0
    assert torch.equal(weight.zeros[1], codes.zeros[1].to(torch.uint8))


def test_8_bit_gptq_becomes_int8() -> None:
    codes = symmetric(random_codes(8), 8)
    weight = read_gptq(gptq_tensors(codes, bits=8), bits=8)
    assert weight.format == "int8"
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


@pytest.mark.parametrize("read", [read_awq, read_gptq], ids=["awq", "gptq"])
def test_symmetric_codes_have_no_zeros(read: Reader) -> None:
    codes = symmetric(random_codes())
    weight = read(awq_tensors(codes) if read is read_awq else gptq_tensors(codes))
    assert weight.zeros is None
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


@pytest.mark.parametrize("read", [read_awq, read_gptq], ids=["awq", "gptq"])
def test_group_size_of_minus_1_is_one_group(read: Reader) -> None:
    codes = random_codes(group_size=IN)
    tensors = awq_tensors(codes) if read is read_awq else gptq_tensors(codes)
    weight = read(tensors, group_size=-1)
    assert weight.group_size == IN
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


def test_last_group_of_gptq_may_be_shorter() -> None:
    codes = random_codes(shape=(72, 16))
    weight = read_gptq(gptq_tensors(codes))
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_with_reordered_channels_is_refused(desc_act: bool) -> None:
    tensors = gptq_tensors(random_codes())
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(UserError, match=r"act-order.*desc_act=False"):
        read_gptq(tensors, desc_act=desc_act)


def test_gptq_with_desc_act_is_read_if_channels_are_in_order() -> None:
    codes = random_codes()
    weight = read_gptq(gptq_tensors(codes), desc_act=True)
    assert torch.equal(weight.dequantize(torch.float64), codes.weight)


def test_gptq_with_desc_act_but_without_g_idx_is_refused() -> None:
    tensors = gptq_tensors(random_codes())
    del tensors["g_idx"]
    assert read_gptq(tensors).shape == (IN, OUT)
    with pytest.raises(UserError, match="act-order"):
        read_gptq(tensors, desc_act=True)


def test_8_bit_gptq_with_zeros_is_refused() -> None:
    with pytest.raises(UserError, match="8-bit codes with zeros"):
        read_gptq(gptq_tensors(random_codes(8), bits=8), bits=8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(awq_config(bits=8), "8 bits.*4 bits in layout 'gemm'", id="awq bits"),
        pytest.param(awq_config(version="gemv"), "'gemv'.*Supported", id="awq layout"),
        pytest.param(gptq_config(bits=3), "3 bits.*4 and 8 bits", id="gptq bits"),
        pytest.param(
            gptq_config(checkpoint_format="marlin"), "'marlin'.*'gptq_v2'", id="gptq format"
        ),
    ],
)
def test_unsupported_bits_and_layouts_are_refused_with_the_supported_ones(
    config: dict[str, Any], words: str
) -> None:
    layout = AwqLayout if config["quant_method"] == "awq" else GptqLayout
    with pytest.raises(UserError, match=words):
        layout.from_config(config)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_truncated_tensors_are_refused(method: str, axis: int, suffix: str) -> None:
    codes = random_codes()
    tensors = awq_tensors(codes) if method == "awq" else gptq_tensors(codes)
    tensors[suffix] = tensors[suffix].narrow(axis, 0, tensors[suffix].shape[axis] - 1)
    with pytest.raises(UserError, match="damaged"):
        read_awq(tensors) if method == "awq" else read_gptq(tensors)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros"])
def test_words_of_another_dtype_are_refused(suffix: str) -> None:
    tensors = awq_tensors(random_codes())
    tensors[suffix] = tensors[suffix].long()
    with pytest.raises(UserError, match=f"{suffix} is torch.int64.*damaged"):
        read_awq(tensors)


def test_zero_scales_are_refused() -> None:
    tensors = awq_tensors(random_codes())
    tensors["scales"][1, 3] = 0
    with pytest.raises(UserError, match="Scales hold zero"):
        read_awq(tensors)


@pytest.mark.parametrize("group_size", [0, 16, -2])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_unsupported_group_size_is_refused(method: str, group_size: int) -> None:
    codes = random_codes(group_size=16)
    tensors = awq_tensors(codes) if method == "awq" else gptq_tensors(codes)
    read = read_awq if method == "awq" else read_gptq
    with pytest.raises(UserError, match=rf"Group size {group_size} is not.*32, 64, 128"):
        read(tensors, group_size=group_size)
