import itertools
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EDGES, THRESHOLDS, VECTORS, draw, exact
from helpers import TOLERANCES, assert_as_precise_as_torch, relative_error
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels import ops, ops_quantized, reference
from teal.kernels.operands import Grid, Operands
from teal.quantization import QuantizedWeight, Scheme, round_to_nearest

pytest.importorskip("cuda.bindings")

from teal.kernels import cuda_gemv
from teal.kernels.cuda_compile import compiled
from teal.kernels.cuda_gemv import SOURCE, can_compute, compute, definitions_of, product_of
from teal.kernels.cuda_gemv_cuts import chunked, cut_for, shared_bytes, tile_columns
from teal.kernels.cuda_strips import DTYPES, WARP, Cut

SCHEMES = {
    "floats": None,
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4 in 32": Scheme(format="int4", group_size=32),
    "int4 in 64 with zeros": Scheme(format="int4", group_size=64, symmetric=False),
    "int4 in 128": Scheme(format="int4", group_size=128),
}
# Channels and columns of the decoder layers of Llama-3-8B and 70B, and of a head.
LAYERS: list[tuple[int, Sequence[int], str | None]] = [
    (4096, [4096], None),
    (4096, [4096, 1024, 1024], None),
    (4096, [14336, 14336], "silu"),
    (14336, [4096], None),
    (8192, [28672, 28672], "gelu_pytorch_tanh"),
    (28672, [8192], None),
    (4096, [128256], None),
]
INF, NAN = math.inf, math.nan

schemes = pytest.mark.parametrize("scheme", SCHEMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer[0]} {layer[1]}")


@dataclass(frozen=True)
class Weight:
    """A weight on the GPU, and what it stands for.

    Attributes:
        tensor: Floats or codes, (K, …).
        grid: What codes stand for.
        exact: The weight in float64, (K, N).
    """

    tensor: Tensor
    grid: Grid | None
    exact: Tensor

    def operands(self, x: Tensor, thresholds: Sequence[float], **rest: Any) -> Operands:
        widths = rest.pop("widths", [self.exact.shape[1]])
        return Operands(x, self.tensor, thresholds, widths, **rest)

    def times(
        self, x: Tensor, thresholds: Sequence[float], cut: Cut | None = None, **rest: Any
    ) -> Tensor:
        return compute(self.operands(x, thresholds, **rest), self.grid, cut)


def _weight(
    scheme: str, in_features: int, columns: int, dtype: torch.dtype, device: str = "cuda"
) -> Weight:
    floats = draw(in_features, columns, dtype=dtype, seed=1)
    wanted = SCHEMES[scheme]
    if wanted is None:
        return Weight(floats.to(device), None, floats.double().to(device))
    return _of(round_to_nearest(floats, wanted).to(device))


def _of(weight: QuantizedWeight) -> Weight:
    grid = Grid(weight.scales, weight.zeros, weight.group_size)
    return Weight(weight.codes, grid, weight.dequantize(torch.float64))


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).cuda()


def _by_torch(weight: Weight, operands: Operands, dtype: torch.dtype) -> Tensor:
    """Compute the product in float32 (in float64 for `dtype` float64) and round it to `dtype`."""
    x, _, thresholds, widths, scale, shift, bias, residual, gain, epsilon, activation = operands
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = x if gain is None else reference.rms_norm(x, gain, epsilon)
    centred = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    products = []
    for part, columns in enumerate(weight.exact.to(wide).split(list(widths), dim=1)):
        score = None if scale is None else scale[part]
        keep = reference.keep_mask(x, thresholds[part], score, shift)
        products.append(torch.where(keep, centred, 0).to(wide) @ columns)
    product = torch.cat(products, dim=-1)
    product = product if bias is None else product + bias.to(wide)
    product = product if residual is None else product + residual.to(wide)
    return (product if activation is None else reference.gate_and_up(product, activation)).to(dtype)


def _assert_right(weight: Weight, operands: Operands, cut: Cut | None = None) -> None:
    result = compute(operands, weight.grid, cut)
    expected = _by_torch(weight, operands, torch.float64)
    by_torch = _by_torch(weight, operands, result.dtype)
    if operands.activation is None:
        assert_as_precise_as_torch(result, by_torch, expected)
        return
    # The exponential of an activation is good to one eps.
    allowed = TOLERANCES["product_factor"] * relative_error(by_torch, expected)
    assert relative_error(result, expected) <= allowed + torch.finfo(result.dtype).eps


def _shape_only(
    scheme: str, layer: tuple[int, Sequence[int], str | None], dtype: torch.dtype, **rest: Any
) -> tuple[Operands, Grid | None]:
    in_features, widths, activation = layer
    columns, wanted = sum(widths), SCHEMES[scheme]

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
    kind = dtype if wanted is None else codes[wanted.format]
    stored = columns // 2 if kind == torch.uint8 else columns
    weight, x = empty(in_features, stored, dtype=kind), empty(1, in_features, dtype=dtype)
    operands = Operands(x, weight, [0.5] * len(widths), widths, activation=activation, **rest)
    if wanted is None:
        return operands, None
    group = wanted.group_size or in_features
    scales = empty(-(-in_features // group), columns, dtype=dtype)
    zeros = None if wanted.symmetric else empty(*scales.shape, dtype=torch.uint8)
    return operands, Grid(scales, zeros, group)


@pytest.mark.parametrize(
    "architecture, dtype",
    [("sm_90", torch.bfloat16), ("sm_90", torch.float16)]
    + [(other, torch.bfloat16) for other in ("sm_80", "sm_100")],
    ids=str,
)
@pytest.mark.parametrize("layer", LAYERS[:3], ids=lambda layer: f"{layer[0]} {layer[1]}")
@schemes
def test_products_compile_to_wide_loads_without_spills(
    scheme: str,
    layer: tuple[int, Sequence[int], str | None],
    architecture: str,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the tools in triton's wheel")
    gain = None if len(layer[1]) == 1 else torch.empty(layer[0], device="meta")
    operands, grid = _shape_only(scheme, layer, dtype, gain=gain)
    cut = cut_for(product_of(operands, grid), clusters=architecture != "sm_80")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, definitions_of(operands, grid, cut), architecture))
    command = [cuobjdump, "--dump-resource-usage", "--dump-sass", cubin]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", told)) == {"0"}
    assert len(re.findall(r"LDG\.E\.NA\.(?:64|128)\.CONSTANT", told)) >= cut.unroll * (
        WARP // cut.lanes
    )


@pytest.mark.parametrize("clusters", [False, True], ids=["", "clusters"])
@pytest.mark.parametrize(
    "layer",
    [*LAYERS, (40, [32], None), (2048, [5632, 5632], "silu"), (11008, [4096], None)],
    ids=lambda layer: f"{layer[0]} {layer[1]}",
)
@schemes
def test_cuts_cover_the_channels_and_fit_into_a_block(
    scheme: str, layer: tuple[int, Sequence[int], str | None], clusters: bool
) -> None:
    product = product_of(*_shape_only(scheme, layer, torch.bfloat16))
    cut = cut_for(product, clusters=clusters)
    assert cut.cluster == 1 or clusters
    assert (cut.cluster - 1) * cut.chunk < product.in_features
    assert tile_columns(product, cut) % cut.cluster == 0
    assert tile_columns(product, cut) // cut.cluster <= cut.threads <= 1024
    assert shared_bytes(product, cut) <= 96 * 1024
    assert not product.group_size or cut.chunk % product.group_size == 0


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.usefixtures("_on_hopper")
@schemes
def test_what_the_kernel_computes_is_told_from_shapes_and_dtypes(scheme: str) -> None:
    def told(
        in_features: int = 128,
        columns: int = 64,
        rows: int = 1,
        threshold: float = 0.5,
        **rest: Any,
    ) -> bool:
        dtype = rest.pop("dtype", torch.bfloat16)
        weight = _weight(scheme, in_features, columns, dtype, "cpu")
        changed = rest.pop("tensor", lambda tensor: tensor)
        operands = weight.operands(draw(rows, in_features, dtype=dtype), [threshold], **rest)
        return can_compute(operands._replace(weight=changed(operands.weight)), weight.grid)

    is_float = scheme == "floats"
    assert told()
    assert told(dtype=torch.float16)
    assert told(gain=torch.ones(128))
    assert told(threshold=-1.0) != is_float
    assert told(rows=8) != is_float
    assert not told(rows=9)
    assert not told(rows=0)
    assert not told(dtype=torch.float32)
    assert not told(columns=68)
    assert not told(in_features=132, gain=torch.ones(132))
    assert not told(tensor=lambda tensor: tensor.t().contiguous().t())
    assert not told(widths=[16] * 4)


@pytest.mark.usefixtures("_on_hopper")
def test_weights_at_odd_addresses_and_groups_of_parts_of_words_are_left_to_others() -> None:
    x = draw(1, 96, dtype=torch.bfloat16)
    odd = draw(96 * 64 + 1, dtype=torch.bfloat16)[1:].view(96, 64)
    assert not can_compute(Operands(x, odd, [0.5], [64]), None)
    codes, scales = torch.zeros(96, 32, dtype=torch.uint8), torch.ones(2, 64)
    assert not can_compute(Operands(x, codes, [0.5], [64]), Grid(scales, None, 48))
    ints = torch.zeros(96, 64, dtype=torch.int8)
    assert not can_compute(Operands(x, ints, [0.5], [64]), Grid(scales, None, 48))


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_kept_channels_equal_those_of_the_reference(
    dtype: torch.dtype, vectors: str, threshold: float
) -> None:
    x = torch.cat([torch.tensor(EDGES, device="cuda"), _draw(55)]).to(dtype)
    x[20] = threshold
    scale = _draw(64, seed=1).abs() if "scale" in vectors else None
    shift = _draw(64, seed=2) if "shift" in vectors else None
    keep = reference.keep_mask(x, threshold, scale, shift)
    # A kept channel brings exactly its own activation to its own column.
    weight = torch.eye(64, dtype=dtype, device="cuda")
    centred = x if shift is None else (x.float() - shift).to(dtype)
    scales = None if scale is None else scale[None]
    operands = Operands(x[None], weight, [threshold], [64], scale=scales, shift=shift)
    # A sum that starts at +0 gives +0 for -0.
    expected = torch.where(keep, centred, 0) + 0.0
    assert torch.equal(compute(operands)[0], expected)


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("edge", [INF, -INF, NAN])
def test_what_is_not_finite_is_kept_and_stays_visible(
    dtype: torch.dtype, scheme: str, edge: float
) -> None:
    x = torch.zeros(1, 160, dtype=dtype, device="cuda")
    x[0, 7] = edge
    result = _weight(scheme, 160, 96, dtype).times(x, [1.0])
    assert not result.isfinite().any()


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("shape", [(63, 32), (300, 288), (1048, 544), (4100, 1056)], ids=str)
def test_product_is_as_precise_as_torch(
    dtype: torch.dtype, scheme: str, shape: tuple[int, int]
) -> None:
    in_features, columns = shape
    weight, x = _weight(scheme, in_features, columns, dtype), _draw(1, in_features, dtype=dtype)
    vectors: dict[str, Any] = {
        "scale": _draw(1, in_features, seed=3).abs(),
        "shift": 0.1 * _draw(in_features, seed=4),
        "bias": _draw(columns, dtype=dtype, seed=2),
    }
    for threshold, given in itertools.product((-1.0, 0.4, 1.0), ({}, vectors)):
        _assert_right(weight, weight.operands(x, [threshold], **given))


@pytest.mark.gpu
@schemes
@pytest.mark.parametrize("warps_n", [2, 4])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_product_is_right_however_it_is_cut(scheme: str, cluster: int, warps_n: int) -> None:
    if cluster > 1 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters of blocks")
    weight, x = _weight(scheme, 1100, 320, torch.bfloat16), _draw(1, 1100, dtype=torch.bfloat16)
    for widths, activation in (([192, 128], None), ([160, 160], "silu")):
        operands = weight.operands(0.2 * x, [0.08, 0.16], widths=widths, activation=activation)
        product = product_of(operands, weight.grid)
        usual = cut_for(product, clusters=False)
        cut = replace(usual, chunk=32, warps_n=warps_n, warps_k=4, unroll=2, cluster=cluster)
        _assert_right(weight, operands, chunked(product, cut))


@pytest.mark.gpu
@schemes
@pytest.mark.parametrize("thresholds", [[0.4], [0.08, 0.16]], ids=["plain", "gated"])
def test_a_block_may_have_several_chunks(scheme: str, thresholds: list[float]) -> None:
    weight, x = _weight(scheme, 1096, 320, torch.bfloat16), _draw(1, 1096, dtype=torch.bfloat16)
    cut = Cut(chunk=256, warps_n=2, warps_k=8, unroll=2, blocks=1, lanes=8)
    cut = replace(cut, lanes=32) if weight.grid is None else cut
    if len(thresholds) == 1:
        gain = torch.ones(1096, device="cuda")
        dense = weight.operands(x, [-1.0], gain=gain, epsilon=1e-5)
        result = compute(dense, weight.grid, cut)
        expected = _by_torch(weight, dense, torch.float64)
        assert relative_error(result, expected) < torch.finfo(torch.bfloat16).eps
        _assert_right(weight, weight.operands(x, thresholds), cut)
    else:
        operands = weight.operands(
            0.2 * x, thresholds, widths=[160, 160], activation="gelu_pytorch_tanh"
        )
        _assert_right(weight, operands, cut)


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("widths", [[256, 32, 32], [288, 64], [96]], ids=str)
def test_parts_have_thresholds_and_scales_of_their_own(
    dtype: torch.dtype, scheme: str, widths: list[int]
) -> None:
    weight, x = _weight(scheme, 600, sum(widths), dtype), _draw(1, 600, dtype=dtype)
    operands = weight.operands(
        x,
        [0.3, -1.0, 1.2][: len(widths)],
        widths=widths,
        scale=0.5 + _draw(len(widths), 600, seed=3).abs(),
        bias=_draw(sum(widths), dtype=dtype, seed=4),
        residual=_draw(1, sum(widths), dtype=dtype, seed=5),
    )
    _assert_right(weight, operands)


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.3, 0.9], [-1.0, -1.0]], ids=str)
def test_gate_and_up_are_multiplied_after_the_activation(
    dtype: torch.dtype, scheme: str, activation: str, thresholds: list[float]
) -> None:
    weight, x = _weight(scheme, 600, 2 * 352, dtype), 0.2 * _draw(1, 600, dtype=dtype)
    given = {"widths": [352] * 2, "activation": activation}
    bias = _draw(704, dtype=dtype, seed=4)
    scale = 0.5 + _draw(2, 600, seed=3).abs()
    cuts = [0.2 * threshold for threshold in thresholds]
    for rest in ({}, {"bias": bias}, {"scale": scale}):
        _assert_right(weight, weight.operands(x, cuts, **given, **rest))


@pytest.mark.gpu
@dtypes
@schemes
@pytest.mark.parametrize("activation", [None, "silu"])
def test_norm_is_applied_before_the_mask(
    dtype: torch.dtype, scheme: str, activation: str | None
) -> None:
    weight, x = _weight(scheme, 1048, 192, dtype), 3 * _draw(1, 1048, dtype=dtype)
    gain = 1 + 0.1 * _draw(1048, seed=2)
    normed = reference.rms_norm(x, gain, 1e-5).float()
    # An activation that is rounded otherwise may not fall on the other side of the threshold.
    x = torch.where((normed.abs() - 0.7).abs() < 0.1, 0, x)
    operands = weight.operands(
        x, [0.7] * 2, widths=[96] * 2, gain=gain, epsilon=1e-5, activation=activation
    )
    result = compute(operands, weight.grid)
    expected = _by_torch(weight, operands, torch.float64)
    # One activation in some hundred is rounded otherwise by one bit.
    assert relative_error(result, expected) < 1.5 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4 in 32", "int4 in 64 with zeros"])
def test_scales_may_have_another_dtype_than_the_activations(
    scales: torch.dtype, scheme: str
) -> None:
    floats, wanted = draw(300, 96, dtype=scales, seed=1), SCHEMES[scheme]
    assert wanted is not None
    weight = _of(round_to_nearest(floats, wanted).to("cuda"))
    for dtype in DTYPES:
        _assert_right(weight, weight.operands(_draw(1, 300, dtype=dtype), [0.4]))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int4 in 32", "int4 in 64 with zeros"])
def test_all_channels_may_be_one_group(scheme: str) -> None:
    wanted = SCHEMES[scheme]
    assert wanted is not None
    grouped = round_to_nearest(draw(1100, 288, seed=1), wanted).to("cuda")
    zeros = None if grouped.zeros is None else grouped.zeros[:1].contiguous()
    shared = QuantizedWeight(
        codes=grouped.codes,
        scales=grouped.scales[:1].contiguous(),
        group_size=1100,
        zeros=zeros,
    )
    weight = _of(shared)
    _assert_right(weight, weight.operands(_draw(1, 1100, dtype=torch.bfloat16), [0.4]))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(2,), (8,), (3, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4 in 128"])
def test_every_row_has_a_mask_of_its_own(scheme: str, rows: tuple[int, ...]) -> None:
    weight, dtype = _weight(scheme, 300, 192, torch.bfloat16), torch.bfloat16
    x, residual = _draw(*rows, 300, dtype=dtype), _draw(*rows, 192, dtype=dtype, seed=2)
    operands = weight.operands(x, [0.4, 0.8], widths=[128, 64], residual=residual)
    _assert_right(weight, operands)
    alone = [
        weight.times(one[None], [0.4, 0.8], widths=[128, 64], residual=added[None])
        for one, added in zip(x.view(-1, 300), residual.view(-1, 192), strict=True)
    ]
    assert torch.equal(compute(operands, weight.grid).view(-1, 192), torch.cat(alone))


@pytest.mark.gpu
@schemes
@pytest.mark.parametrize("threshold", [INF, -1.0], ids=["all dropped", "all kept"])
def test_all_or_nothing_may_be_dropped(scheme: str, threshold: float) -> None:
    dtype = torch.bfloat16
    weight, x, bias = _weight(scheme, 300, 96, dtype), _draw(1, 300, dtype=dtype), _draw(96)
    operands = weight.operands(x, [threshold], bias=bias.to(dtype))
    if threshold == INF:
        assert torch.equal(compute(operands, weight.grid), bias.to(dtype)[None])
    else:
        _assert_right(weight, operands)


@pytest.mark.gpu
@schemes
def test_twice_the_same_gives_the_same_bits(scheme: str) -> None:
    weight, x = _weight(scheme, 4096, 1024, torch.bfloat16), _draw(1, 4096, dtype=torch.bfloat16)
    first = weight.times(x, [0.5])
    assert all(torch.equal(first, weight.times(x, [0.5])) for _ in range(20))


@pytest.mark.gpu
def test_x_may_lie_anywhere() -> None:
    weight, dtype = _weight("int8", 296, 96, torch.bfloat16), torch.bfloat16
    x, gain = _draw(1, 296, dtype=dtype), 1 + 0.1 * _draw(296, seed=2)
    expected = weight.times(x, [0.4], gain=gain, epsilon=1e-5)
    odd = torch.cat([x.new_zeros(1), x[0]])[1:][None]
    strided = torch.stack([x[0], x[0]], dim=1)[:, :1].t()
    for other in (odd, strided):
        assert torch.equal(weight.times(other, [0.4], gain=gain, epsilon=1e-5), expected)


@pytest.mark.gpu
@schemes
def test_each_product_waits_for_the_one_that_it_reads(scheme: str) -> None:
    weight, dtype = _weight(scheme, 1024, 1024, torch.bfloat16), torch.bfloat16
    gain = torch.ones(1024, device="cuda")

    def chain(*, synchronize: bool) -> Tensor:
        x = _draw(1, 1024, dtype=dtype)
        for _ in range(50):
            x = weight.times(x, [0.3], residual=x, gain=gain, epsilon=1e-5)
            if synchronize:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(synchronize=False), chain(synchronize=True))


@pytest.mark.gpu
@schemes
def test_products_are_captured_in_a_cuda_graph(scheme: str) -> None:
    weight, x = _weight(scheme, 1024, 256, torch.bfloat16), _draw(1, 1024, dtype=torch.bfloat16)
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
    weight, x = _weight("floats", 88, 88, torch.float16), _draw(1, 88, dtype=torch.float16)
    with (
        pytest.raises(UserError, match="Run it once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        weight.times(x, [0.5])


@pytest.mark.gpu
def test_operations_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters of blocks")
    calls = []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return compute(*given)

    monkeypatch.setattr(cuda_gemv, "compute", counted)
    x, dtype = _draw(1, 256, dtype=torch.bfloat16), torch.bfloat16
    floats, codes = (
        _weight("floats", 256, 128, dtype),
        _weight("int4 in 64 with zeros", 256, 128, dtype),
    )
    ops.sparse_gemv(x, floats.tensor, 0.5)
    ops.sparse_parts(x, floats.tensor, [0.5, 0.4], [64, 64])
    ops.sparse_gated(x, floats.tensor, [0.5, 0.4], "silu")
    assert codes.grid is not None
    ops_quantized.quantized_parts(x, codes.tensor, *codes.grid, [-1.0, -1.0], [64, 64])
    ops_quantized.quantized_gated(x, codes.tensor, *codes.grid, [0.5, 0.4], "silu")
    assert len(calls) == 5


@pytest.mark.gpu
def test_exact_products_of_the_tests_are_those_of_the_reference() -> None:
    weight, x = _weight("floats", 300, 96, torch.float16), _draw(1, 300, dtype=torch.float16)
    operands = weight.operands(x, [0.4])
    expected = exact(x, weight.tensor, 0.4)
    torch.testing.assert_close(_by_torch(weight, operands, torch.float64), expected)
