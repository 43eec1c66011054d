import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import backend as reference_backend
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import by_reference, draw, exact

pytest.importorskip("numba")

from teal.kernels.cpu import quantized_gemv
from teal.kernels.ops import quantized_glu, quantized_linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SCHEMES = {
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4 in groups of 32": Scheme(format="int4", group_size=32),
    "int4 in groups of 128": Scheme(format="int4"),
    "int4 with zeros": Scheme(format="int4", group_size=64, symmetric=False),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
IN_PLAIN_TORCH = reference_backend._quantized_products


@pytest.fixture(autouse=True)
def _only_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test pass by way of the reference."""
    monkeypatch.setattr(reference_backend, "_quantized_products", None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weight_of(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedWeight:
    return round_to_nearest(draw(*shape, dtype=dtype, seed=1), scheme)


def tensors(weight: QuantizedWeight) -> tuple[Any, ...]:
    return weight.codes, weight.scales, weight.zeros, weight.group_size


def multiplied(x: Tensor, weight: QuantizedWeight, threshold: float, **vectors: Any) -> Tensor:
    return quantized_linear(x, *tensors(weight), [threshold], [weight.out_features], **vectors)


def by_torch(x: Tensor, weight: QuantizedWeight, threshold: float, **vectors: Any) -> Tensor:
    """Multiply as torch does with the weight as float32 and round once."""
    dense = weight.dequantize()
    kept = reference.sparse_activation(x, threshold, vectors.get("score_scale"))
    bias = vectors.get("bias")
    product = kept.float() @ dense
    return (product if bias is None else product + bias.float()).to(x.dtype)


@dtypes
@schemes
@pytest.mark.parametrize("rows", [(), (2, 1), (8,)], ids=str)
@pytest.mark.parametrize("shape", [(63, 129), (700, 64), (4097, 9)], ids=str)
def test_product_is_as_precise_as_torch_on_the_dequantized_weight(
    dtype: torch.dtype, scheme: Scheme, rows: tuple[int, ...], shape: tuple[int, int]
) -> None:
    x, weight = draw(*rows, shape[0], dtype=dtype), weight_of(scheme, shape, dtype)
    bias = draw(shape[1], dtype=dtype, seed=2)
    for vectors in ({}, {"bias": bias}):
        expected = exact(x, weight.dequantize(torch.float64), 0.4, **vectors)
        product = multiplied(x, weight, 0.4, **vectors)
        assert product.shape == (*rows, shape[1])
        assert_as_precise_as_torch(product, by_torch(x, weight, 0.4, **vectors), expected)


@schemes
def test_scales_may_have_another_dtype_than_the_activations(scheme: Scheme) -> None:
    x, weight = draw(2, 130, dtype=torch.bfloat16), weight_of(scheme, (130, 70), torch.float16)
    expected = exact(x, weight.dequantize(torch.float64), 0.4)
    assert_as_precise_as_torch(multiplied(x, weight, 0.4), by_torch(x, weight, 0.4), expected)


@schemes
def test_all_weights_of_one_output_may_share_a_scale(scheme: Scheme) -> None:
    weight = weight_of(scheme, (130, 71), torch.float32)
    zeros = None if weight.zeros is None else weight.zeros[:1]
    shared = QuantizedWeight(
        codes=weight.codes, scales=weight.scales[:1], group_size=130, zeros=zeros
    )
    x = draw(3, 130)
    expected = exact(x, shared.dequantize(torch.float64), 0.4)
    assert_as_precise_as_torch(multiplied(x, shared, 0.4), by_torch(x, shared, 0.4), expected)


@schemes
def test_negative_threshold_is_dense(scheme: Scheme) -> None:
    x, weight = draw(2, 130), weight_of(scheme, (130, 71), torch.float32)
    expected = x.double() @ weight.dequantize(torch.float64)
    assert_as_precise_as_torch(multiplied(x, weight, -1.0), by_torch(x, weight, -1.0), expected)


@schemes
def test_every_code_is_read_as_what_it_stands_for(scheme: Scheme) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    if scheme.format == "fp8":
        # The codes that are no number stand for nothing.
        every = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    codes = every.view(torch.int8)[None] if scheme.format == "int8" else every[None]
    columns = 2 * codes.shape[1] if scheme.format == "int4" else codes.shape[1]
    zeros = None if scheme.symmetric else torch.full((1, columns), 3, dtype=torch.uint8)
    weight = QuantizedWeight(codes=codes, scales=torch.ones(1, columns), group_size=1, zeros=zeros)
    assert torch.equal(multiplied(torch.ones(1), weight, 0.0), weight.dequantize()[0])


@schemes
def test_strips_of_dropped_channels_are_never_used(scheme: Scheme) -> None:
    x, weight = draw(200), weight_of(scheme, (200, 71), torch.float32)
    product = multiplied(x, weight, 0.6)
    dropped = ~reference.keep_mask(x, 0.6)
    spoilt = weight.codes.view(torch.uint8).clone()
    spoilt[dropped] = 0x55
    _, *rest = tensors(weight)
    again = quantized_linear(x, spoilt.view(weight.codes.dtype), *rest, [0.6], [71])
    assert torch.equal(again, product)


@schemes
@pytest.mark.parametrize("visible", [math.nan, math.inf])
def test_nan_and_inf_in_one_row_stay_visible_there_and_only_there(
    scheme: Scheme, visible: float
) -> None:
    x, weight = draw(3, 130), weight_of(scheme, (130, 70), torch.float32)
    x[1, 77] = visible
    product = multiplied(x, weight, 0.5)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


@schemes
def test_everything_dropped_leaves_bias_and_residual(scheme: Scheme) -> None:
    weight, bias, residual = weight_of(scheme, (130, 71), torch.float32), draw(71), draw(2, 71)
    product = multiplied(draw(2, 130), weight, math.inf, bias=bias, residual=residual)
    assert torch.equal(product, bias + residual)


def fused(
    dtype: torch.dtype, rows: int, output_sizes: tuple[int, ...], scheme: Scheme
) -> dict[str, Any]:
    weight = weight_of(scheme, (300, sum(output_sizes)), dtype)
    return {
        "x": 3 * draw(rows, 300, dtype=dtype),
        **dict(zip(("codes", "scales", "zeros", "group_size"), tensors(weight), strict=True)),
        "thresholds": [0.4, 0.9, 0.1][: len(output_sizes)],
        "score_scale": draw(len(output_sizes), 300, seed=2).abs(),
        "shift": 0.1 * draw(300, seed=3),
        "bias": 20 * draw(sum(output_sizes), dtype=dtype, seed=4),
        "norm_weight": draw(300, dtype=dtype, seed=5),
        "eps": 1e-5,
    }


def in_plain_torch(form: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
    with mock.patch.object(reference_backend, "_quantized_products", IN_PLAIN_TORCH):
        return by_reference(form, **arguments)


def in_float64(form: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
    """Compute a form from the exact weight, the norm and the mask being those of the dtype."""
    given = dict(arguments)
    x = reference.rms_norm(given["x"], given.pop("norm_weight"), given.pop("eps"))
    weight = QuantizedWeight(
        codes=given["codes"],
        scales=given["scales"],
        zeros=given["zeros"],
        group_size=given["group_size"],
    ).dequantize(torch.float64)
    gated = form is quantized_glu
    output_sizes = [weight.shape[1] // 2] * 2 if gated else given["output_sizes"]
    rules = zip(
        weight.split(output_sizes, dim=1), given["thresholds"], given["score_scale"], strict=True
    )
    parts = [exact(x, w, t, score_scale=s, shift=given["shift"]) for w, t, s in rules]
    both = torch.cat(parts, dim=-1) + given["bias"].double()
    if gated:
        return reference.gate_and_up(both, given["activation"])
    return both + given["residual"].double()


@dtypes
@schemes
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("output_sizes", [(129,), (301, 20, 21), (1, 128, 1)], ids=str)
def test_parts_have_masks_of_their_own_and_take_norm_shift_bias_and_residual(
    dtype: torch.dtype, scheme: Scheme, rows: int, output_sizes: tuple[int, ...], two_threads: None
) -> None:
    arguments = {**fused(dtype, rows, output_sizes, scheme), "output_sizes": output_sizes}
    arguments["residual"] = 20 * draw(rows, sum(output_sizes), dtype=dtype, seed=6)
    expected = in_float64(quantized_linear, arguments)
    product = quantized_linear(**arguments)
    assert_as_precise_as_torch(product, in_plain_torch(quantized_linear, arguments), expected)


@dtypes
@schemes
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("half", [64, 333])
def test_gate_and_up_are_as_precise_as_torch(
    dtype: torch.dtype, scheme: Scheme, rows: int, activation: str, half: int, two_threads: None
) -> None:
    arguments = {**fused(dtype, rows, (half, half), scheme), "activation": activation}
    expected = in_float64(quantized_glu, arguments)
    product = quantized_glu(**arguments)
    assert_as_precise_as_torch(product, in_plain_torch(quantized_glu, arguments), expected)


@schemes
@pytest.mark.parametrize("rows", [1, 5])
def test_bits_do_not_depend_on_the_number_of_threads(
    scheme: Scheme, rows: int, two_threads: None
) -> None:
    arguments = fused(torch.bfloat16, rows, (701, 499), scheme)
    arguments["thresholds"] = [0.0, 5.0]

    def results() -> list[Tensor]:
        gated = quantized_glu(**arguments, activation="silu")
        return [quantized_linear(**arguments, output_sizes=(701, 499)), gated]

    by_two = results()
    torch.set_num_threads(1)
    assert all(map(torch.equal, by_two, results()))


@dtypes
@schemes
@pytest.mark.parametrize("shape", [(129, 64), (700, 257)], ids=str)
def test_floats_have_the_bits_of_the_reference(
    dtype: torch.dtype, scheme: Scheme, shape: tuple[int, int], two_threads: None
) -> None:
    weight = weight_of(scheme, shape, dtype)
    operands = Operands(draw(9, shape[0], dtype=dtype), weight.codes, [0.5], [shape[1]])
    quant = QuantParams(weight.scales, weight.zeros, weight.group_size)
    assert torch.equal(quantized_gemv.dequantized(operands, quant), weight.dequantize(dtype))


@schemes
def test_more_rows_than_the_kernel_takes_are_multiplied_with_floats(scheme: Scheme) -> None:
    x, weight = draw(9, 130), weight_of(scheme, (130, 71), torch.float32)
    expected = exact(x, weight.dequantize(torch.float64), 0.4)
    assert_as_precise_as_torch(multiplied(x, weight, 0.4), by_torch(x, weight, 0.4), expected)
