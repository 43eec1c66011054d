import pytest
import torch

from teal.benchmark.bytes_read import WeightsRead, bytes_kept
from teal.engine.weights.quantized import quantized_head
from teal.engine.weights.random import random_weights
from teal.models.architectures import architecture_of
from teal.quantization import Scheme, round_to_nearest
from tests.helpers import tiny_model

OUTPUT_SIZES = {"gate": 96, "up": 32}


@pytest.mark.parametrize(
    ("scheme", "head", "expected", "shown"),
    [
        (None, False, WeightsRead(), "float"),
        (None, True, WeightsRead(head_format="int8"), "float, int8 head"),
        (Scheme(format="int8"), False, WeightsRead(format="int8"), "int8"),
        (
            Scheme(format="int4", group_size=32),
            True,
            WeightsRead(format="int4", group_size=32, head_format="int8"),
            "int4, groups of 32, int8 head",
        ),
    ],
    ids=["float", "head", "int8", "int4"],
)
def test_formats_of_weights_are_named(
    scheme: Scheme | None, head: bool, expected: WeightsRead, shown: str
) -> None:
    architecture = architecture_of(
        tiny_model("llama", hidden_size=64, intermediate_size=128).config
    )
    weights = random_weights(architecture, torch.float32, torch.device("cpu"), scheme=scheme)
    read = WeightsRead.of(quantized_head(weights) if head else weights)
    assert read == expected
    assert str(read) == shown


@pytest.mark.parametrize(
    ("scheme", "skippable", "always"),
    [
        (None, 64 * 128 * 2, 0),
        (Scheme(format="int8"), 64 * 128, 128 * 2),
        (Scheme(format="int4", group_size=32), 64 * 64, 2 * 128 * 2),
        (Scheme(format="int4", group_size=32, symmetric=False), 64 * 64, 2 * 128 * 3),
    ],
    ids=["float", "int8", "int4", "int4 with zeros"],
)
def test_weight_rows_are_skipped_and_scales_are_not(
    scheme: Scheme | None, skippable: int, always: int
) -> None:
    dense = torch.randn(64, 128, dtype=torch.bfloat16)
    matrix = round_to_nearest(dense, scheme) if scheme else dense
    assert bytes_kept(matrix, OUTPUT_SIZES, {}) == skippable + always
    halved = bytes_kept(matrix, OUTPUT_SIZES, {"gate": 0.5})
    assert halved == skippable * (1 - 0.5 * 96 / 128) + always
