import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_error
from tests.kernels.cases import draw
from tests.kernels.compiling import assert_no_spills, assert_weight_rows_load_whole

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.gemv import SOURCE, compute, gemv_config_of, product_of
from teal.kernels.cuda.gemv_config import chunked, config_for, shared_bytes, tile_columns
from teal.kernels.cuda.nvrtc import compiled
from teal.kernels.cuda.tile_config import WARP, TileConfig
from teal.kernels.operands import Operands, QuantParams
from tests.kernels.cuda.products import assert_right, weight_of
from tests.kernels.emulation import DEVICE, emulate
from tests.kernels.products import SCHEMES, by_torch
from tests.pairwise import by_pairs, pairwise

# Channels and columns of the decoder layers of Llama-3-8B and 70B, and of a language-model head.
LAYERS: list[tuple[int, Sequence[int], str | None]] = [
    (4096, [4096], None),
    (4096, [4096, 1024, 1024], None),
    (4096, [14336, 14336], "silu"),
    (14336, [4096], None),
    (8192, [28672, 28672], "gelu_pytorch_tanh"),
    (28672, [8192], None),
    (4096, [128256], None),
]

schemes = pytest.mark.parametrize("scheme", SCHEMES)


def over_tile_configs(**parameters: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by rows in which all pairs meet: on an emulated GPU, or a real one."""
    marks = [pytest.mark.gpu] if torch.cuda.is_available() else []
    cases = [
        pytest.param(row, id="-".join(map(str, row.values())), marks=marks)
        for row in pairwise(**parameters)
    ]
    return pytest.mark.parametrize("row", cases)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate a GPU with clusters of blocks where there is none."""
    if not torch.cuda.is_available():
        emulate(monkeypatch, clusters=True)
    elif torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters of blocks")


def _shape_only(
    scheme: str, layer: tuple[int, Sequence[int], str | None], dtype: torch.dtype, **rest: Any
) -> tuple[Operands, QuantParams | None]:
    in_features, output_sizes, activation = layer
    columns, wanted = sum(output_sizes), SCHEMES[scheme]

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
    kind = dtype if wanted is None else codes[wanted.format]
    stored = columns // 2 if kind == torch.uint8 else columns
    weight, x = empty(in_features, stored, dtype=kind), empty(1, in_features, dtype=dtype)
    operands = Operands(
        x, weight, [0.5] * len(output_sizes), output_sizes, activation=activation, **rest
    )
    if wanted is None:
        return operands, None
    group = wanted.group_size or in_features
    scales = empty(-(-in_features // group), columns, dtype=dtype)
    zeros = None if wanted.symmetric else empty(*scales.shape, dtype=torch.uint8)
    return operands, QuantParams(scales, zeros, group)


@by_pairs(
    scheme=list(SCHEMES),
    layer=LAYERS[:3],
    architecture=["sm_90", "sm_80", "sm_100"],
    dtype=[torch.bfloat16, torch.float16],
)
def test_products_compile_to_wide_loads_without_spills(
    scheme: str,
    layer: tuple[int, Sequence[int], str | None],
    architecture: str,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    norm_weight = None if len(layer[1]) == 1 else torch.empty(layer[0], device="meta")
    operands, quant = _shape_only(scheme, layer, dtype, norm_weight=norm_weight)
    config = config_for(product_of(operands, quant), clusters=architecture != "sm_80")
    cubin = tmp_path / "kernel.cubin"
    # With equal and with different masks of gate and up.
    for thresholds in ([0.5] * 3, [0.5, 0.6, 0.7]):
        wanted = operands._replace(thresholds=thresholds[: len(layer[1])])
        compiled_for = gemv_config_of(wanted, quant, config)
        cubin.write_bytes(compiled(SOURCE, compiled_for, architecture))
        assert_no_spills(cubin)
        assert_weight_rows_load_whole(cubin, config, operands.weight.dtype)


@pytest.mark.parametrize("clusters", [False, True], ids=["", "clusters"])
@pytest.mark.parametrize(
    "layer",
    [*LAYERS, (40, [32], None), (2048, [5632, 5632], "silu"), (11008, [4096], None)],
    ids=lambda layer: f"{layer[0]} {layer[1]}",
)
@schemes
def test_tile_configs_cover_the_channels_and_fit_into_a_block(
    scheme: str, layer: tuple[int, Sequence[int], str | None], clusters: bool
) -> None:
    product = product_of(*_shape_only(scheme, layer, torch.bfloat16))
    config = config_for(product, clusters=clusters)
    assert config.cluster == 1 or clusters
    assert (config.cluster - 1) * config.chunk < product.in_features
    finished = math.ceil(tile_columns(product, config) / config.cluster)
    assert (config.cluster - 1) * finished < tile_columns(product, config)
    assert finished <= config.threads <= 1024
    assert shared_bytes(product, config) <= 96 * 1024
    assert not product.group_size or config.chunk % product.group_size == 0


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "int4 in" in name])
@pytest.mark.parametrize("warps_n", [1, 2, 4])
def test_groups_never_need_more_threads_than_a_block_has(scheme: str, warps_n: int) -> None:
    product = product_of(*_shape_only(scheme, (1200, [192, 128], None), torch.bfloat16))
    for cluster in (1, 2, 4, 6, 8):
        config = config_for(product, clusters=False)
        config = replace(config, chunk=WARP, warps_n=warps_n, warps_k=8, cluster=cluster)
        assert chunked(product, config).threads <= 1024


@by_pairs(rows=range(2, 9), layer=LAYERS[:4])
def test_products_of_several_rows_compile_without_spills(
    layer: tuple[int, Sequence[int], str | None], rows: int, tmp_path: Path
) -> None:
    operands, _ = _shape_only("floats", layer, torch.bfloat16)
    x = torch.empty(rows, layer[0], dtype=torch.bfloat16, device="meta")
    operands = operands._replace(x=x)
    product = product_of(operands, None)
    config = config_for(product, clusters=True)
    assert shared_bytes(product, config) <= 96 * 1024
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, gemv_config_of(operands, None, config), "sm_90"))
    assert_no_spills(cubin)
    assert_weight_rows_load_whole(cubin, config, operands.weight.dtype, rows)


def test_a_tile_config_that_does_not_suit_the_product_does_not_compile() -> None:
    operands, quant = _shape_only("int4 in 128", LAYERS[2], torch.bfloat16)
    product = product_of(operands, quant)
    config = TileConfig(chunk=32, per_lane=32, warps_n=4, warps_k=2, unroll=4, blocks=1, cluster=2)
    with pytest.raises(RuntimeError, match="a thread finishes a column"):
        compiled(SOURCE, gemv_config_of(operands, quant, chunked(product, config)), "sm_90")


@over_tile_configs(
    scheme=list(SCHEMES),
    cluster=[1, 2, 4, 6, 8] if torch.cuda.is_available() else [1, 4, 6],
    warps_n=[2, 4],
    depth_and_early=[(1, 5), (2, 0)],
    activation=[None, "silu"],
)
def test_product_is_right_with_every_tile_config(row: dict[str, Any], gpu: None) -> None:
    weight, x = weight_of(row["scheme"], 1200, 320, torch.bfloat16), draw(1, 1200)
    depth, early = row["depth_and_early"]
    operands = weight.operands(
        0.2 * x.to(DEVICE, torch.bfloat16),
        [0.08, 0.16],
        output_sizes=[192, 128] if row["activation"] is None else [160, 160],
        activation=row["activation"],
    )
    product = product_of(operands, weight.quant)
    usual = config_for(product, clusters=False)
    config = replace(usual, chunk=32, warps_n=row["warps_n"], warps_k=8, unroll=2)
    config = replace(config, cluster=row["cluster"], depth=depth, early=early)
    assert_right(weight, operands, chunked(product, config))


@over_tile_configs(output_sizes=[[192, 128], [160, 160]])
def test_threads_of_floats_may_have_half_as_many_columns(row: dict[str, Any], gpu: None) -> None:
    weight, x = weight_of("floats", 1200, 320, torch.bfloat16), draw(1, 1200, dtype=torch.bfloat16)
    config = TileConfig(chunk=32, per_lane=4, warps_n=2, warps_k=4, unroll=8, blocks=1, cluster=8)
    operands = weight.operands(x.to(DEVICE), [0.4, 0.8], **row)
    assert_right(weight, operands, chunked(product_of(operands, None), config))


@over_tile_configs(
    cluster=[1, 6, 8],
    columns_and_unroll=[(2, 16), (2, 32), (4, 16), (8, 16)],
    depth_and_early=[(1, 0), (2, 32)],
    rows=[2, 3, 8],
    activation=[None, "silu"],
)
def test_several_rows_are_right_with_every_tile_config(row: dict[str, Any], gpu: None) -> None:
    x = 0.2 * draw(row["rows"], 600, seed=1).to(DEVICE, torch.bfloat16)
    (per_lane, unroll), (depth, early) = row["columns_and_unroll"], row["depth_and_early"]
    config = TileConfig(chunk=32, per_lane=per_lane, warps_n=2, warps_k=4, unroll=unroll, blocks=1)
    config = replace(config, cluster=row["cluster"], depth=depth, early=early)
    output_sizes = [200, 160] if row["activation"] is None else [184, 184]
    weight = weight_of("floats", 600, sum(output_sizes), torch.bfloat16)
    operands = weight.operands(
        x, [0.08, 0.16], output_sizes=output_sizes, activation=row["activation"]
    )
    assert_right(weight, operands, chunked(product_of(operands, None), config))


@over_tile_configs(scheme=list(SCHEMES), form=["dense behind a norm", "sparse", "gated"])
def test_a_block_may_have_several_chunks(row: dict[str, Any], gpu: None) -> None:
    weight, x = weight_of(row["scheme"], 600, 320, torch.bfloat16), draw(1, 600)
    x = x.to(DEVICE, torch.bfloat16)
    config = TileConfig(chunk=256, warps_n=2, warps_k=8, unroll=2, blocks=1)
    norm_weight = torch.ones(600, device=DEVICE)
    operands = {
        "dense behind a norm": weight.operands(x, [-1.0], norm_weight=norm_weight, eps=1e-5),
        "sparse": weight.operands(x, [0.4]),
        "gated": weight.operands(
            0.2 * x, [0.08, 0.16], output_sizes=[160, 160], activation="gelu_pytorch_tanh"
        ),
    }[row["form"]]
    if row["form"] == "dense behind a norm":
        result = compute(operands, weight.quant, config)
        expected = by_torch(weight, operands, torch.float64)
        assert relative_error(result, expected) < torch.finfo(torch.bfloat16).eps
    else:
        assert_right(weight, operands, config)
