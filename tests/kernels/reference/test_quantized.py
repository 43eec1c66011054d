import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal.kernels.reference.matmul import keep_mask, sparse_gemv
from teal.kernels.reference.quantized import (
    dequantized,
    pack_nibbles,
    quantized_gemv,
    unpack_nibbles,
)
from tests.helpers import assert_as_precise_as_torch, relative_error

IN, OUT = 70, 9


def operands(kind: str, group_size: int = IN) -> tuple[Tensor, Tensor, Tensor | None, int]:
    generator = torch.Generator().manual_seed(3)
    groups = -(-IN // group_size)
    scales = 0.01 + torch.rand(groups, OUT, generator=generator)
    if kind == "int8":
        codes = torch.randint(-128, 128, (IN, OUT), generator=generator, dtype=torch.int8)
        return codes, scales, None, group_size
    if kind == "fp8":
        codes = torch.randn(IN, OUT, generator=generator).to(torch.float8_e4m3fn)
        return codes, scales, None, group_size
    unsigned = torch.randint(0, 16, (IN, OUT), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (groups, OUT), generator=generator, dtype=torch.uint8)
    return pack_nibbles(unsigned), scales, zeros if kind == "int4-zeros" else None, group_size


every_kind = pytest.mark.parametrize(
    ("kind", "group_size"),
    [("int8", IN), ("int8", 32), ("fp8", IN), ("int4", 32), ("int4-zeros", 32), ("int4", IN)],
    ids=str,
)


def activations(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3,)) -> Tensor:
    return torch.randn(*rows, IN, generator=torch.Generator().manual_seed(4)).to(dtype)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_nibbles_round_trips_at_odd_and_even_widths(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), columns), codes)


def test_the_left_of_two_columns_is_in_the_lower_half() -> None:
    packed = pack_nibbles(torch.tensor([[1, 2, 15]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F]]


def test_int4_without_zeros_is_centred_on_eight() -> None:
    codes = pack_nibbles(torch.tensor([[0, 8, 15]], dtype=torch.uint8))
    weight = dequantized(codes, torch.full((1, 3), 0.5), None, 1)
    assert weight.tolist() == [[-4.0, 0.0, 3.5]]


@every_kind
def test_the_product_in_float64_is_that_of_the_dequantized_weight(
    kind: str, group_size: int
) -> None:
    quantized = operands(kind, group_size)
    x = activations(torch.float64)
    exact = sparse_gemv(x, dequantized(*quantized, torch.float64), 0.6)
    product = quantized_gemv(x, *quantized, 0.6, accumulate=torch.float64)
    assert product.dtype == torch.float64
    assert relative_error(product, exact) < 1e-14


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_float32_are_as_precise_as_torch_on_the_dequantized_weight(
    kind: str, group_size: int, dtype: torch.dtype
) -> None:
    quantized = operands(kind, group_size)
    x = activations(dtype)
    exact = quantized_gemv(x, *quantized, 0.6, accumulate=torch.float64)
    kept = torch.where(keep_mask(x, 0.6), x, torch.zeros((), dtype=dtype))
    by_torch = (kept.float() @ dequantized(*quantized)).to(dtype)
    assert_as_precise_as_torch(quantized_gemv(x, *quantized, 0.6), by_torch, exact)


@every_kind
def test_sums_in_float32_err_by_a_few_of_its_roundings(kind: str, group_size: int) -> None:
    quantized = operands(kind, group_size)
    x = activations()
    exact = quantized_gemv(x, *quantized, 0.6, accumulate=torch.float64)
    error = relative_error(quantized_gemv(x, *quantized, 0.6), exact)
    assert error <= 2 * torch.finfo(torch.float32).eps


@every_kind
def test_dropped_channels_are_never_used(kind: str, group_size: int) -> None:
    codes, *rest = operands(kind, group_size)
    x = activations(rows=())
    dropped = ~keep_mask(x, 0.6)
    product = quantized_gemv(x, codes, *rest, 0.6)
    spoilt = codes.view(torch.uint8).clone()
    spoilt[dropped] = 0x55
    assert dropped.any()
    assert torch.equal(quantized_gemv(x, spoilt.view(codes.dtype), *rest, 0.6), product)


def test_a_kept_channel_with_nan_stays_visible() -> None:
    x = activations(rows=())
    x[5] = torch.nan
    assert quantized_gemv(x, *operands("int4", 32), 0.6).isnan().all()


def test_a_threshold_below_zero_is_the_dense_product() -> None:
    quantized = operands("int8")
    x = activations()
    exact = x.double() @ dequantized(*quantized, torch.float64)
    product = quantized_gemv(x, *quantized, -1.0, accumulate=torch.float64)
    assert relative_error(product, exact) < 1e-14


def test_scale_and_shift_choose_and_centre_as_in_the_dense_product() -> None:
    quantized = operands("int4-zeros", 32)
    generator = torch.Generator().manual_seed(5)
    score_scale, shift = torch.rand(IN, generator=generator), torch.randn(IN, generator=generator)
    bias = torch.randn(OUT, generator=generator)
    x = activations()
    weight = dequantized(*quantized)
    expected = sparse_gemv(x, weight, 0.3, score_scale, shift, bias)
    product = quantized_gemv(x, *quantized, 0.3, score_scale, shift, bias)
    assert relative_error(product, expected) < 1e-6


def test_only_zeros_give_the_bias() -> None:
    bias = torch.arange(float(OUT))
    product = quantized_gemv(torch.zeros(2, IN), *operands("int8"), 0.0, bias=bias)
    assert torch.equal(product, bias.expand(2, OUT))
