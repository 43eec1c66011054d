import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.reference import matmul as reference
from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import EDGES, THRESHOLDS, VECTORS, by_reference, draw, exact

pytest.importorskip("numba")

from teal.kernels.cpu.gemv import ELEMENTS
from teal.kernels.cpu.kept_channels import list_kept
from teal.kernels.ops import sparse_gemv, sparse_glu, sparse_linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF, NAN = math.inf, math.nan
# Of 16-bit numbers: threads share the channels in eight shares, in two, and not at all.
WIDTHS = [(700, 500), (3000, 2004), (9000, 8004)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _kept(
    x: Tensor, threshold: float, score_scale: Tensor | None, shift: Tensor | None
) -> list[int]:
    integers = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    rows = x.reshape(-1, x.shape[-1]).view(integers.get(x.dtype, x.dtype)).numpy()
    channels = np.empty(rows.shape[1], np.int64)
    values = np.empty((rows.shape[1], rows.shape[0]), np.float32)
    addresses = [0 if vector is None else vector.data_ptr() for vector in (score_scale, shift)]
    kept = list_kept(rows, *addresses, np.float32(threshold), channels, values)
    return channels[:kept].tolist()


@dtypes
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_kept_channels_equal_those_of_the_reference(
    dtype: torch.dtype, vectors: str, threshold: float
) -> None:
    x = torch.cat([torch.tensor([*EDGES, INF, -INF, NAN, 65504.0]), draw(200)]).to(dtype)
    x[20] = threshold
    score_scale = draw(len(x), seed=1).abs() if "score_scale" in vectors else None
    shift = draw(len(x), seed=2) if "shift" in vectors else None
    expected = reference.keep_mask(x, threshold, score_scale, shift).nonzero().flatten().tolist()
    assert _kept(x, threshold, score_scale, shift) == expected


@dtypes
def test_a_strip_is_read_when_any_row_keeps_it(dtype: torch.dtype) -> None:
    x = draw(8, 300, dtype=dtype)
    expected = reference.keep_mask(x, 1.9).any(dim=0).nonzero().flatten().tolist()
    assert 0 < len(expected) < 300
    assert _kept(x, 1.9, None, None) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_ulps", [0, 1, -1])
def test_every_16_bit_number_is_read_exactly_and_rounded_to_nearest_even(
    dtype: torch.dtype, half_ulps: int
) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    neighbour = (every.view(torch.int16) + 1).view(dtype)
    difference = (neighbour.float() - every.float()).to(dtype)
    difference = torch.where(difference.isfinite(), difference, 0)
    expected = (every.float() + 0.5 * half_ulps * difference.float()).to(dtype)
    x = torch.tensor([1.0, 0.5 * half_ulps], dtype=dtype)
    product = sparse_gemv(x, torch.stack([every, difference]), 0.0)
    torch.testing.assert_close(product, expected, rtol=0.0, atol=0.0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("rows", [(), (1,), (2, 1), (8,)], ids=str)
@pytest.mark.parametrize("in_features, out_features", [(63, 129), (129, 63), (700, 257), (4097, 9)])
def test_product_is_as_precise_as_torch(
    dtype: torch.dtype, rows: tuple[int, ...], in_features: int, out_features: int
) -> None:
    x = draw(*rows, in_features, dtype=dtype)
    weight = draw(in_features, out_features, dtype=dtype, seed=1)
    bias = draw(out_features, dtype=dtype, seed=2)
    vectors = {
        "score_scale": draw(in_features, seed=3).abs(),
        "shift": 0.1 * draw(in_features, seed=4),
    }
    for given_vectors in ({}, vectors, {"bias": bias, **vectors}):
        by_torch = reference.sparse_gemv(x, weight, 0.4, **given_vectors)
        expected = exact(x, weight, 0.4, **given_vectors)
        product = sparse_gemv(x, weight, 0.4, **given_vectors)
        assert product.shape == (*rows, out_features)
        assert_as_precise_as_torch(product, by_torch, expected)


@dtypes
@pytest.mark.parametrize("size", [(4096, 321), (700, 5003), (300, 17001)], ids=str)
def test_product_of_two_threads_is_as_precise_as_torch(
    dtype: torch.dtype, size: tuple[int, int], two_threads: None
) -> None:
    x, weight = draw(size[0], dtype=dtype), draw(*size, dtype=dtype, seed=1)
    expected = exact(x, weight, 0.6)
    assert_as_precise_as_torch(
        sparse_gemv(x, weight, 0.6), reference.sparse_gemv(x, weight, 0.6), expected
    )


@dtypes
def test_negative_threshold_is_dense(dtype: torch.dtype) -> None:
    x, weight = draw(130, dtype=dtype), draw(130, 70, dtype=dtype, seed=1)
    expected = x.double() @ weight.double()
    assert_as_precise_as_torch(sparse_gemv(x, weight, -1.0), x @ weight, expected)


@dtypes
def test_zero_input_gives_the_bias(dtype: torch.dtype) -> None:
    bias = draw(70, dtype=dtype)
    product = sparse_gemv(
        torch.zeros(2, 130, dtype=dtype), draw(130, 70, dtype=dtype), 0.0, bias=bias
    )
    assert torch.equal(product, bias.expand(2, 70))


@dtypes
def test_everything_dropped_gives_zero(dtype: torch.dtype) -> None:
    product = sparse_gemv(draw(130, dtype=dtype), draw(130, 70, dtype=dtype), 1e9)
    assert torch.equal(product, torch.zeros(70, dtype=dtype))


@dtypes
@pytest.mark.parametrize("visible", [NAN, INF])
def test_nan_and_inf_in_one_row_stay_visible_there_and_only_there(
    dtype: torch.dtype, visible: float
) -> None:
    x = draw(3, 130, dtype=dtype)
    x[1, 77] = visible
    product = sparse_gemv(x, draw(130, 70, dtype=dtype, seed=1), 0.5)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


def test_residual_is_added_before_rounding() -> None:
    x, weight = draw(2, 130, dtype=torch.bfloat16), draw(130, 70, dtype=torch.bfloat16, seed=1)
    residual = 100 * draw(2, 70, dtype=torch.bfloat16, seed=2)
    expected = exact(x, weight, 0.5) + residual.double()
    by_torch = reference.sparse_gemv(x, weight, 0.5) + residual
    assert_as_precise_as_torch(
        sparse_linear(x, weight, [0.5], [70], residual=residual), by_torch, expected
    )


def test_bits_do_not_depend_on_the_number_of_threads_or_the_call(two_threads: None) -> None:
    x, weight = draw(4, 300, dtype=torch.bfloat16), draw(300, 1031, dtype=torch.bfloat16, seed=1)
    by_two = [sparse_gemv(x, weight, 0.5) for _ in range(5)]
    torch.set_num_threads(1)
    by_one = sparse_gemv(x, weight, 0.5)
    assert all(torch.equal(product, by_one) for product in by_two)


@dtypes
def test_rows_give_the_bits_of_their_products_alone_when_all_channels_are_kept(
    dtype: torch.dtype,
) -> None:
    x, weight = draw(5, 130, dtype=dtype), draw(130, 70, dtype=dtype, seed=1)
    alone = torch.stack([sparse_gemv(row, weight, -1.0) for row in x])
    assert torch.equal(sparse_gemv(x, weight, -1.0), alone)


@dtypes
def test_layout_of_the_inputs_does_not_change_the_bits(dtype: torch.dtype) -> None:
    x, weight = draw(3, 130, dtype=dtype), draw(130, 200, dtype=dtype, seed=1)
    part = slice(64, 135)
    expected = sparse_gemv(x, weight[:, part].contiguous(), 0.5)
    assert torch.equal(sparse_gemv(x, weight[:, part], 0.5), expected)
    assert torch.equal(sparse_gemv(x.T.contiguous().T, weight[:, part], 0.5), expected)


def test_products_of_two_python_threads_do_not_disturb_each_other(two_threads: None) -> None:
    weight = draw(300, 1031, dtype=torch.bfloat16)
    inputs = [draw(300, dtype=torch.bfloat16, seed=seed) for seed in range(40)]
    expected = [sparse_gemv(x, weight, 0.5) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        products = list(pool.map(lambda x: sparse_gemv(x, weight, 0.5), inputs))
    assert all(map(torch.equal, products, expected))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_sizes_give_what_an_empty_sum_is(shape: tuple[int, int]) -> None:
    product = sparse_gemv(torch.ones(2, shape[0]), torch.ones(shape), 0.0)
    assert torch.equal(product, torch.zeros(2, shape[1]))
    assert sparse_gemv(torch.ones(0, 4), torch.ones(4, 3), 0.0).shape == (0, 3)


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 8),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    channel=st.integers(0, 69),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_and_a_threshold_equal_to_an_entry_match_the_exact_product(
    seed: int, rows: int, in_features: int, out_features: int, dtype: torch.dtype, channel: int
) -> None:
    x = draw(rows, in_features, dtype=dtype, seed=seed)
    weight = draw(in_features, out_features, dtype=dtype, seed=seed + 1)
    threshold = float(x[0, channel % in_features].abs())
    expected = exact(x, weight, threshold)
    magnitude = x.abs().double() @ weight.abs().double()
    allowed = torch.finfo(dtype).eps * expected.abs() + 1e-6 * magnitude
    assert ((sparse_gemv(x, weight, threshold).double() - expected).abs() <= allowed).all()


def test_a_weight_with_columns_apart_is_refused_rather_than_copied_for_every_token() -> None:
    with pytest.raises(UserError, match=r"weight\.contiguous"):
        sparse_gemv(torch.ones(4), torch.ones(3, 4).T, 0.0)


def _fused(dtype: torch.dtype, rows: int, output_sizes: tuple[int, ...]) -> dict[str, Any]:
    in_features = 700
    vectors = {
        "x": 3 * draw(rows, in_features, dtype=dtype),
        "weight": draw(in_features, sum(output_sizes), dtype=dtype, seed=1),
        "score_scale": draw(len(output_sizes), in_features, seed=2).abs(),
        "shift": 0.1 * draw(in_features, seed=3),
        "bias": 20 * draw(sum(output_sizes), dtype=dtype, seed=4),
        "norm_weight": draw(in_features, dtype=dtype, seed=5),
    }
    return {**vectors, "thresholds": [0.4, 0.9, 0.1][: len(output_sizes)], "eps": 1e-5}


def _exact_parts(operands: dict[str, Any], output_sizes: tuple[int, ...]) -> Tensor:
    x, shift = operands["x"], operands.get("shift")
    if "norm_weight" in operands:
        x = reference.rms_norm(x, operands["norm_weight"], operands["eps"])
    rules = zip(
        operands["weight"].split(output_sizes, dim=1),
        operands["thresholds"],
        operands.get("score_scale", [None] * len(output_sizes)),
        strict=True,
    )
    parts = [exact(x, w, t, score_scale=s, shift=shift) for w, t, s in rules]
    return torch.cat(parts, dim=-1) + operands["bias"].double()


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("output_sizes", [(129,), (64, 33), (300, 20, 21), (1, 128, 1)], ids=str)
@pytest.mark.parametrize("given", ["everything", "lists", "one list"])
def test_parts_have_masks_of_their_own_and_are_as_precise_as_torch(
    dtype: torch.dtype, rows: int, output_sizes: tuple[int, ...], given: str, two_threads: None
) -> None:
    operands = _fused(dtype, rows, output_sizes)
    if given != "everything":
        operands = {
            k: v for k, v in operands.items() if k not in ("score_scale", "shift", "norm_weight")
        }
    if given == "one list":
        operands["thresholds"] = [0.4] * len(output_sizes)
    residual = 20 * draw(rows, sum(output_sizes), dtype=dtype, seed=6)
    expected = _exact_parts(operands, output_sizes) + residual.double()
    arguments = {**operands, "output_sizes": output_sizes}
    by_torch = by_reference(sparse_linear, **arguments, residual=residual)
    assert_as_precise_as_torch(sparse_linear(**arguments, residual=residual), by_torch, expected)


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("half", [64, 333, sum(WIDTHS[2]) // 2])
@pytest.mark.parametrize("lists", [1, 2])
def test_gate_and_up_are_as_precise_as_torch(
    dtype: torch.dtype, rows: int, activation: str, half: int, lists: int, two_threads: None
) -> None:
    operands = _fused(dtype, rows, (half, half))
    if lists == 1:
        del operands["score_scale"]
        operands["thresholds"] = [0.4, 0.4]
    gate, up = _exact_parts(operands, (half, half)).chunk(2, dim=-1)
    arguments = {**operands, "activation": activation}
    by_torch = by_reference(sparse_glu, **arguments)
    expected = reference.GATES[activation](gate) * up
    assert_as_precise_as_torch(sparse_glu(**arguments), by_torch, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_activations_of_large_and_unusual_numbers_are_those_of_torch(activation: str) -> None:
    gates = torch.tensor([0.0, -0.0, 1e-30, 20.0, -20.0, 88.5, -88.5, 1e4, -1e4, INF, -INF, NAN])
    weight = torch.cat([gates, torch.ones(len(gates))])[None]
    result = sparse_glu(torch.ones(1), weight, [-1.0, -1.0], activation)
    expected = reference.GATES[activation](gates)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("output_sizes", WIDTHS, ids=str)
def test_fused_forms_have_the_same_bits_for_any_number_of_threads(
    rows: int, output_sizes: tuple[int, int], two_threads: None
) -> None:
    # Parts keep different numbers of channels, so borders between threads are not in the middle.
    operands = _fused(torch.bfloat16, rows, output_sizes)
    arguments = {**operands, "thresholds": [0.0, 5.0]}

    def results() -> list[Tensor]:
        return [
            sparse_linear(**arguments, output_sizes=output_sizes),
            sparse_glu(**arguments, activation="silu"),
        ]

    by_two = results()
    torch.set_num_threads(1)
    assert all(map(torch.equal, by_two, results()))


def test_every_element_type_is_its_own_numba_type() -> None:
    assert len({type(element) for element in ELEMENTS.values()}) == len(ELEMENTS)
