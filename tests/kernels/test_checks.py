"""Operands that do not fit together are refused in a sentence with a cure."""

from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels import ops
from teal.quantization import Scheme, round_to_nearest
from tests.kernels.cases import ATTENTION_CASES, draw


def _weight(scheme: Scheme) -> dict[str, Any]:
    weight = round_to_nearest(draw(70, 96, seed=1), scheme)
    names = ("codes", "scales", "zeros", "group_size")
    return {name: getattr(weight, name) for name in names}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": draw(1, 71)}, "Give x"),
        ({"weight": draw(70, 96).half()}, "one dtype"),
        ({"shift": draw(71)}, r"shift has shape \(71,\)"),
        ({"bias": draw(95)}, r"bias has shape \(95,\)"),
        ({"thresholds": [0.5]}, "one of each per part"),
        ({"output_sizes": [32, 32]}, "do not sum to the 96 columns"),
        ({"residual": draw(3, 96)}, "residual has shape"),
        ({"bias": draw(96).half()}, "one dtype"),
        ({"residual": draw(1, 96).half()}, "one dtype"),
        ({"score_scale": draw(2, 71)}, r"score_scale has shape \(71,\)"),
        ({"norm_weight": draw(96)}, r"norm_weight has shape \(96,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_of_a_product_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str
) -> None:
    fitting = {"x": draw(1, 70), "weight": draw(70, 96), "thresholds": [0.5, 0.5]}
    with pytest.raises(UserError, match=message):
        ops.sparse_linear(**{**fitting, "output_sizes": [32, 64], **change})


def test_operands_of_the_head_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"weight \(out_features, in_features\)"):
        ops.lm_head_gemv(draw(1, 70), draw(70, 96))
    with pytest.raises(UserError, match="one dtype"):
        ops.lm_head_gemv(draw(1, 70), draw(96, 70).half())


def test_an_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="Known: gelu_pytorch_tanh, silu"):
        ops.sparse_glu(draw(1, 70), draw(70, 96), [0.5, 0.5], "relu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": draw(1, 71)}, "x has shape"),
        ({"codes": torch.zeros(70, 48)}, "Give a channel-major weight of int8"),
        ({"codes": torch.zeros(70, 47, dtype=torch.uint8)}, r"codes has shape .* \(70, 48\)"),
        ({"codes": torch.zeros(70, 96, dtype=torch.int8)}, "only with int4 codes"),
        ({"scales": draw(2, 96)}, r"scales has shape \(2, 96\)\. Give \(3, 96\)"),
        ({"zeros": torch.zeros(3, 48, dtype=torch.uint8)}, "zeros has shape"),
        ({"zeros": torch.zeros(3, 96)}, "Give uint8"),
        ({"group_size": 0}, "in groups of 0"),
        ({"output_sizes": [32, 32]}, "do not sum to the 96 columns"),
        ({"bias": draw(95)}, r"bias has shape \(95,\)"),
        ({"residual": draw(1, 96).half()}, "one dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_of_a_quantized_product_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str
) -> None:
    fitting = _weight(Scheme(format="int4", group_size=32, symmetric=False))
    fitting |= {"x": draw(1, 70), "thresholds": [0.5, 0.5], "output_sizes": [32, 64]}
    with pytest.raises(UserError, match=message):
        ops.quantized_linear(**{**fitting, **change})


def test_an_unknown_activation_of_a_quantized_product_names_the_known_ones() -> None:
    weight = _weight(Scheme(format="int8"))
    with pytest.raises(UserError, match="Known: gelu_pytorch_tanh, silu"):
        ops.quantized_glu(x=draw(1, 70), **weight, thresholds=[0.5, 0.5], activation="relu")


@pytest.mark.parametrize(
    "place, tensor, message",
    [
        (0, draw(3, 97), "qkv has shape"),
        (0, draw(3, 64), "qkv has shape"),
        (0, draw(2, 128), "qkv has shape"),
        (1, draw(3, 2, 41, 16), "keys have shape"),
        (1, draw(3, 2, 16, 40).mT, "contiguous"),
        (2, draw(3, 2, 40, 16).half(), "one dtype"),
        (3, torch.zeros(2, dtype=torch.int64), "positions has shape"),
        (3, torch.zeros(3, dtype=torch.int32), "int64"),
        (4, draw(43, 9), "at most 8"),
        (5, draw(39, 4), "cosines have shape"),
    ],
)
def test_operands_of_attention_that_do_not_fit_are_refused(
    place: int, tensor: Tensor, message: str
) -> None:
    tensors = list(ATTENTION_CASES["everything"].tensors(torch.float32))
    tensors[place] = tensor
    with pytest.raises(UserError, match=message):
        ops.attend(*tensors, scale=1.0)
