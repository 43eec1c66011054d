import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight, round_to_nearest
from tests.helpers import relative_error
from tests.kernels.cases import EDGES, THRESHOLDS, VECTORS, draw

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.gemv import CudaBackend, compute
from teal.kernels.cuda.tile_config import DTYPES
from tests.kernels.emulation import DEVICE, emulate
from tests.kernels.products import SCHEMES, assert_right, by_torch, of_quantized, weight_of

INF, NAN = math.inf, math.nan

schemes = pytest.mark.parametrize("scheme", SCHEMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def _can_run(operands: Operands, quant: QuantParams | None) -> bool:
    return CudaBackend().can_run(operands, quant) is None


@pytest.mark.usefixtures("_on_hopper")
@schemes
def test_shapes_and_dtypes_decide_whether_the_kernel_can_run(scheme: str) -> None:
    def can_run(
        in_features: int = 128,
        columns: int = 64,
        rows: int = 1,
        threshold: float = 0.5,
        **rest: Any,
    ) -> bool:
        dtype = rest.pop("dtype", torch.bfloat16)
        weight = weight_of(scheme, in_features, columns, dtype, "cpu")
        changed = rest.pop("tensor", lambda tensor: tensor)
        operands = weight.operands(draw(rows, in_features, dtype=dtype), [threshold], **rest)
        return _can_run(operands._replace(weight=changed(operands.weight)), weight.quant)

    is_float = scheme == "floats"
    assert can_run()
    assert can_run(dtype=torch.float16)
    assert can_run(norm_weight=torch.ones(128))
    assert can_run(threshold=-1.0) != is_float
    gated = {"output_sizes": [32] * 2, "activation": "silu"}
    assert can_run(threshold=-1.0, **gated)
    assert can_run(rows=8)
    assert can_run(rows=8, threshold=-1.0) != is_float
    assert can_run(rows=8, threshold=-1.0, **gated)
    assert not can_run(rows=9)
    assert not can_run(rows=0)
    assert not can_run(dtype=torch.float32)
    assert not can_run(columns=68)
    assert not can_run(in_features=132, norm_weight=torch.ones(132))
    assert not can_run(tensor=lambda tensor: tensor.t().contiguous().t())
    assert not can_run(output_sizes=[16] * 4)


@pytest.mark.usefixtures("_on_hopper")
def test_weights_at_odd_addresses_and_groups_of_odd_sizes_are_left_to_other_backends() -> None:
    x = draw(1, 96, dtype=torch.bfloat16)
    odd = draw(96 * 64 + 1, dtype=torch.bfloat16)[1:].view(96, 64)
    assert not _can_run(Operands(x, odd, [0.5], [64]), None)
    codes, scales = torch.zeros(96, 32, dtype=torch.uint8), torch.ones(2, 64)
    assert not _can_run(Operands(x, codes, [0.5], [64]), QuantParams(scales, None, 48))
    ints = torch.zeros(96, 64, dtype=torch.int8)
    assert not _can_run(Operands(x, ints, [0.5], [64]), QuantParams(scales, None, 48))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_kept_channels_equal_those_of_the_reference(
    dtype: torch.dtype, vectors: str, threshold: float
) -> None:
    x = torch.cat([torch.tensor(EDGES, device=DEVICE), _draw(55)]).to(dtype)
    x[20] = threshold
    score_scale = _draw(64, seed=1).abs() if "score_scale" in vectors else None
    shift = _draw(64, seed=2) if "shift" in vectors else None
    keep = reference.keep_mask(x, threshold, score_scale, shift)
    # Each kept channel contributes exactly its activation, to its own column.
    weight = torch.eye(64, dtype=dtype, device=DEVICE)
    centred = x if shift is None else (x.float() - shift).to(dtype)
    scales = None if score_scale is None else score_scale[None]
    operands = Operands(x[None], weight, [threshold], [64], score_scale=scales, shift=shift)
    # A sum that starts at +0 gives +0 for -0.
    expected = torch.where(keep, centred, 0) + 0.0
    assert torch.equal(compute(operands)[0], expected)


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("edge", [INF, -INF, NAN])
def test_nan_and_infinity_are_kept_and_stay_visible(
    dtype: torch.dtype, scheme: str, edge: float
) -> None:
    x = torch.zeros(1, 160, dtype=dtype, device=DEVICE)
    x[0, 7] = edge
    result = weight_of(scheme, 160, 96, dtype).times(x, [1.0])
    assert not result.isfinite().any()


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("shape", [(63, 32), (300, 288), (1048, 544), (4100, 1056)], ids=str)
def test_product_is_as_precise_as_torch(
    dtype: torch.dtype, scheme: str, shape: tuple[int, int]
) -> None:
    in_features, columns = shape
    weight, x = weight_of(scheme, in_features, columns, dtype), _draw(1, in_features, dtype=dtype)
    vectors: dict[str, Any] = {
        "score_scale": _draw(1, in_features, seed=3).abs(),
        "shift": 0.1 * _draw(in_features, seed=4),
        "bias": _draw(columns, dtype=dtype, seed=2),
    }
    for threshold in (-1.0, 0.4, 1.0):
        assert_right(weight, weight.operands(x, [threshold]))
        assert_right(weight, weight.operands(x, [threshold], **vectors))


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("output_sizes", [[256, 32, 32], [288, 64], [96]], ids=str)
def test_every_part_has_its_own_threshold_and_score_scale(
    dtype: torch.dtype, scheme: str, output_sizes: list[int]
) -> None:
    weight, x = weight_of(scheme, 600, sum(output_sizes), dtype), _draw(1, 600, dtype=dtype)
    operands = weight.operands(
        x,
        [0.3, -1.0, 1.2][: len(output_sizes)],
        output_sizes=output_sizes,
        score_scale=0.5 + _draw(len(output_sizes), 600, seed=3).abs(),
        bias=_draw(sum(output_sizes), dtype=dtype, seed=4),
        residual=_draw(1, sum(output_sizes), dtype=dtype, seed=5),
    )
    assert_right(weight, operands)


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.3, 0.9], [-1.0, -1.0]], ids=str)
def test_gate_and_up_are_multiplied_after_the_activation(
    dtype: torch.dtype, scheme: str, activation: str, thresholds: list[float]
) -> None:
    weight, x = weight_of(scheme, 600, 2 * 352, dtype), 0.2 * _draw(1, 600, dtype=dtype)
    given = {"output_sizes": [352] * 2, "activation": activation}
    bias = _draw(704, dtype=dtype, seed=4)
    score_scale = 0.5 + _draw(2, 600, seed=3).abs()
    scaled = [0.2 * threshold for threshold in thresholds]
    for rest in ({}, {"bias": bias}, {"score_scale": score_scale}):
        assert_right(weight, weight.operands(x, scaled, **given, **rest))


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("activation", [None, "silu"])
def test_norm_is_applied_before_the_mask(
    dtype: torch.dtype, scheme: str, activation: str | None
) -> None:
    weight, x = weight_of(scheme, 1048, 192, dtype), 3 * _draw(1, 1048, dtype=dtype)
    norm_weight = 1 + 0.1 * _draw(1048, seed=2)
    normed = reference.rms_norm(x, norm_weight, 1e-5).float()
    # Rounding differently must not move an activation across the threshold.
    x = torch.where((normed.abs() - 0.7).abs() < 0.1, 0, x)
    operands = weight.operands(
        x,
        [0.7] * 2,
        output_sizes=[96] * 2,
        norm_weight=norm_weight,
        eps=1e-5,
        activation=activation,
    )
    result = compute(operands, weight.quant)
    expected = by_torch(weight, operands, torch.float64)
    # About one activation in a hundred is rounded differently, by one bit.
    assert relative_error(result, expected) < 1.5 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4 in 32", "int4 in 64 with zeros"])
def test_scales_may_have_another_dtype_than_the_activations(
    scales: torch.dtype, scheme: str
) -> None:
    floats, wanted = draw(300, 96, dtype=scales, seed=1), SCHEMES[scheme]
    assert wanted is not None
    weight = of_quantized(round_to_nearest(floats, wanted).to(DEVICE))
    for dtype in DTYPES:
        assert_right(weight, weight.operands(_draw(1, 300, dtype=dtype), [0.4]))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int4 in 32", "int4 in 64 with zeros"])
def test_all_channels_may_be_one_group(scheme: str) -> None:
    wanted = SCHEMES[scheme]
    assert wanted is not None
    grouped = round_to_nearest(draw(1200, 288, seed=1), wanted).to(DEVICE)
    zeros = None if grouped.zeros is None else grouped.zeros[:1].contiguous()
    shared = QuantizedWeight(
        codes=grouped.codes,
        scales=grouped.scales[:1].contiguous(),
        group_size=1200,
        zeros=zeros,
    )
    weight = of_quantized(shared)
    assert_right(weight, weight.operands(_draw(1, 1200, dtype=torch.bfloat16), [0.4]))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(2,), (8,), (3, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4 in 128"])
def test_every_row_has_its_own_mask(scheme: str, rows: tuple[int, ...]) -> None:
    weight, dtype = weight_of(scheme, 300, 192, torch.bfloat16), torch.bfloat16
    x, residual = _draw(*rows, 300, dtype=dtype), _draw(*rows, 192, dtype=dtype, seed=2)
    operands = weight.operands(x, [0.4, 0.8], output_sizes=[128, 64], residual=residual)
    assert_right(weight, operands)
    alone = [
        weight.times(one[None], [0.4, 0.8], output_sizes=[128, 64], residual=added[None])
        for one, added in zip(x.view(-1, 300), residual.view(-1, 192), strict=True)
    ]
    assert torch.equal(compute(operands, weight.quant).view(-1, 192), torch.cat(alone))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", range(2, 9))
@dtypes
def test_rows_of_floats_are_multiplied_at_once(dtype: torch.dtype, rows: int) -> None:
    weight, x = weight_of("floats", 600, 352, dtype), _draw(rows, 600, dtype=dtype)
    # One row keeps nothing, another everything.
    x[0] *= 0.01
    x[-1] += 3.0
    score_scale = 0.5 + _draw(2, 600, seed=3).abs()
    plain = {"bias": _draw(352, dtype=dtype, seed=4), "shift": 0.1 * _draw(600, seed=5)}
    residual = _draw(rows, 352, dtype=dtype, seed=2)
    assert_right(weight, weight.operands(x, [0.8], **plain, residual=residual))
    halves = {"output_sizes": [176] * 2, "activation": "silu"}
    assert_right(weight, weight.operands(0.2 * x, [0.1] * 2, **halves))
    assert_right(weight, weight.operands(0.2 * x, [0.1, 0.2], **halves, score_scale=score_scale))
    # Each row is normed on its own.
    norm_weight = 1 + 0.1 * _draw(600, seed=6)
    norm = {"output_sizes": [256, 96], "norm_weight": norm_weight, "eps": 1e-5}
    together = weight.times(x, [-1.0, 0.5], **norm)
    alone = [weight.times(row[None], [-1.0, 0.5], **norm) for row in x]
    assert relative_error(together, torch.cat(alone).double()) < 4 * torch.finfo(dtype).eps


@dtypes
def test_rows_of_floats_are_right_on_an_emulated_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, clusters=True)
    for rows in (2, 3, 4, 5, 8):
        test_rows_of_floats_are_multiplied_at_once(dtype, rows)


@pytest.mark.gpu
@schemes
@pytest.mark.parametrize("threshold", [INF, -1.0], ids=["all dropped", "all kept"])
def test_everything_or_nothing_may_be_dropped(scheme: str, threshold: float) -> None:
    dtype = torch.bfloat16
    weight, x, bias = weight_of(scheme, 300, 96, dtype), _draw(1, 300, dtype=dtype), _draw(96)
    operands = weight.operands(x, [threshold], bias=bias.to(dtype))
    if threshold == INF:
        assert torch.equal(compute(operands, weight.quant), bias.to(dtype)[None])
    else:
        assert_right(weight, operands)


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", ""])
@schemes
def test_products_are_right_on_an_emulated_gpu(
    scheme: str, clusters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, clusters=clusters)
    for dtype in DTYPES:
        test_product_is_as_precise_as_torch(dtype, scheme, (300, 288))
        test_every_part_has_its_own_threshold_and_score_scale(dtype, scheme, [288, 64])
    test_gate_and_up_are_multiplied_after_the_activation(dtype, scheme, "silu", [0.3, 0.9])
    test_norm_is_applied_before_the_mask(dtype, scheme, "silu")
    test_everything_or_nothing_may_be_dropped(scheme, INF)


@dtypes
def test_kept_channels_equal_those_of_the_reference_on_an_emulated_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, clusters=True)
    for vectors in VECTORS:
        for threshold in THRESHOLDS:
            test_kept_channels_equal_those_of_the_reference(dtype, vectors, threshold)


@pytest.mark.gpu
@schemes
def test_twice_the_same_gives_the_same_bits(scheme: str) -> None:
    weight, x = weight_of(scheme, 4096, 1024, torch.bfloat16), _draw(1, 4096, dtype=torch.bfloat16)
    first = weight.times(x, [0.5])
    assert all(torch.equal(first, weight.times(x, [0.5])) for _ in range(20))


@pytest.mark.gpu
def test_x_may_have_any_address_and_stride() -> None:
    weight, dtype = weight_of("int8", 296, 96, torch.bfloat16), torch.bfloat16
    x, norm_weight = _draw(1, 296, dtype=dtype), 1 + 0.1 * _draw(296, seed=2)
    expected = weight.times(x, [0.4], norm_weight=norm_weight, eps=1e-5)
    odd = torch.cat([x.new_zeros(1), x[0]])[1:][None]
    strided = torch.stack([x[0], x[0]], dim=1)[:, :1].t()
    for other in (odd, strided):
        assert torch.equal(weight.times(other, [0.4], norm_weight=norm_weight, eps=1e-5), expected)


@pytest.mark.gpu
@schemes
def test_a_product_waits_for_the_one_whose_result_it_reads(scheme: str) -> None:
    weight, dtype = weight_of(scheme, 1024, 1024, torch.bfloat16), torch.bfloat16
    norm_weight = torch.ones(1024, device=DEVICE)

    def chain(*, synchronize: bool) -> Tensor:
        x = _draw(1, 1024, dtype=dtype)
        for _ in range(50):
            x = weight.times(x, [0.3], residual=x, norm_weight=norm_weight, eps=1e-5)
            if synchronize:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(synchronize=False), chain(synchronize=True))


@pytest.mark.gpu
@schemes
def test_products_are_captured_in_a_cuda_graph(scheme: str) -> None:
    weight, x = weight_of(scheme, 1024, 256, torch.bfloat16), _draw(1, 1024, dtype=torch.bfloat16)
    expected = [weight.times(factor * x, [0.5]) for factor in (1.0, 0.5)]
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        result = weight.times(given, [0.5])
    for factor, wanted in zip((1.0, 0.5), expected, strict=True):
        given.copy_(factor * x)
        graph.replay()
        assert torch.equal(result, wanted)


@pytest.mark.gpu
def test_the_first_product_of_a_kind_cannot_be_captured() -> None:
    weight, x = weight_of("floats", 88, 88, torch.float16), _draw(1, 88, dtype=torch.float16)
    with (
        pytest.raises(UserError, match="Run it once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        weight.times(x, [0.5])
