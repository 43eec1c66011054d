from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.kernels.reference import matmul as reference

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.decode_step import (
    ALIGNMENT,
    SOURCE,
    UNIT,
    InputName,
    Projections,
    config_for,
    project,
    step_config,
)
from teal.kernels.cuda.embed_argmax import final_norm
from teal.kernels.cuda.nvrtc import compiled
from teal.kernels.cuda.tile_config import DTYPES, TileConfig
from tests.kernels.compiling import assert_no_spills, assert_weight_rows_load_whole
from tests.kernels.emulation import emulate
from tests.kernels.stepping import (
    EPS,
    HEAD_DIM,
    HEADS,
    MULTIPLIER,
    SCHEMES,
    SIZES,
    SPLITS,
    Wanted,
    exact_product,
    fixed,
    hopper,
    in_a_gap,
    magnitude,
    memory_of,
    normed,
    outlined,
    projections_of,
    thresholds_at,
)
from tests.pairwise import by_pairs, pairwise

# K and the output sizes of each input, as odd as weights of 16 bits allow.
SHAPES: dict[InputName, tuple[int, list[int]]] = {
    "hidden": (584, [264, 24, 8]),
    "attention": (HEADS * HEAD_DIM, [584]),
    "silu": (1048, [584]),
    "gelu_pytorch_tanh": (200, [264]),
}
# The same, for weights of every format.
ALIGNED: dict[InputName, tuple[int, list[int]]] = {
    "hidden": (584, [288, 32, 32]),
    "attention": (HEADS * HEAD_DIM, [608]),
    "silu": (1048, [544]),
    "gelu_pytorch_tanh": (200, [288]),
}

# They differ from each other in every respect.
CONFIGS = [
    TileConfig(chunk=256, per_lane=8, warps_n=2, warps_k=4, unroll=4, blocks=2, cluster=8, depth=2),
    TileConfig(
        chunk=608, per_lane=16, warps_n=1, warps_k=8, unroll=2, blocks=2, cluster=4, depth=2
    ),
    TileConfig(
        chunk=128, per_lane=32, warps_n=1, warps_k=4, unroll=4, blocks=2, cluster=8, early=32
    ),
    TileConfig(chunk=96, per_lane=16, warps_n=4, warps_k=2, unroll=8, blocks=1, cluster=8, early=3),
    TileConfig(chunk=160, per_lane=4, warps_n=1, warps_k=8, unroll=8, blocks=1, cluster=8),
]

configs = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.chunk} × {config.columns}"
)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def _steps() -> Iterator[Any]:
    """Return rows of parameters for an emulated GPU and for the one that is there."""
    rows = pairwise(
        scheme=list(SCHEMES),
        config=[None, *CONFIGS],
        kind=list(SHAPES),
        sparsity=[0.5, None, 0.95, 1.0],
        dtype=list(DTYPES),
        bias=[False, True],
        # A GPU has them or not.
        clusters=[True, False],
    )
    for row in rows:
        config = "" if row["config"] is None else row["config"].chunk
        id = "-".join(str(config if name == "config" else row[name]) for name in row)
        yield pytest.param("cpu", row, id=f"emulated-{id}")
        yield pytest.param("cuda", row, id=f"cuda-{id}", marks=pytest.mark.gpu)


steps = pytest.mark.parametrize(("device", "row"), list(_steps()))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the device of the tensors, with a GPU emulated on the CPU."""
    if request.param == "emulated":
        emulate(monkeypatch, clusters=True)
    return "cpu" if request.param == "emulated" else "cuda"


def wanted(kind: InputName, scheme: str = "floats", **changes: object) -> Wanted:
    in_features, output_sizes = (SHAPES if scheme == "floats" else ALIGNED)[kind]
    return replace(Wanted(kind, in_features, output_sizes, SCHEMES[scheme]), **changes)  # type: ignore[arg-type]


def _for(scheme: str, config: TileConfig) -> TileConfig:
    """Return a config with a number of columns per thread that the format allows."""
    least, most = {"floats": (4, 8), "int8": (8, 16), "fp8": (8, 16)}.get(scheme, (8, 32))
    return replace(config, per_lane=min(max(config.per_lane, least), most))


def _source(kind: InputName, dtype: torch.dtype, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """Return what an input is made from, and the activations that result, (K,)."""
    in_features, _ = SHAPES[kind]
    generator = torch.Generator().manual_seed(2)
    if kind == "attention":
        parts = torch.randn(1, HEADS, SPLITS, HEAD_DIM + 2, generator=generator)
        parts[..., -1] = parts[..., -1].exp()
        parts[:, 0, 3:, HEAD_DIM], parts[:, 0, 3:, HEAD_DIM + 1] = -1e30, 0.0
        factor = torch.exp(parts[..., -2:-1] - parts[..., -2:-1].amax(2, keepdim=True))
        weights = (factor * parts[..., -1:]).sum(2)
        x = ((factor * parts[..., :HEAD_DIM]).sum(2) / weights).flatten()
        return parts.to(device), x.to(device, dtype)
    if kind == "hidden":
        hidden = 3 * torch.randn(in_features, generator=generator)
        return fixed(hidden).to(device), hidden.to(device)
    both = torch.randn(2 * in_features, generator=generator)
    gate, up = both.chunk(2)
    return fixed(both).to(device), (reference.GATES[kind](gate) * up).to(device, dtype)


def _assert_right(
    projections: Projections,
    sparsity: float | None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> None:
    source, x = _source(projections.input, dtype, device)
    memory = memory_of(dtype, device)
    if projections.norm_weight is not None:
        x = normed(x, projections, dtype)
    if sparsity is not None:
        projections.thresholds.copy_(torch.tensor(thresholds_at(x, sparsity, 3)))
    exact = exact_product(projections, x)
    sums = fixed(torch.ones(len(exact))).to(device)
    project(projections, source, sums, None, memory, dependent=device == "cuda" and hopper())
    error = (sums.double() * UNIT - 1.0 - exact * MULTIPLIER).abs().max()
    assert error <= torch.finfo(dtype).eps / 8 * magnitude(projections, x)
    assert not memory.overflow


@by_pairs(scheme=list(SCHEMES), kind=list(SHAPES), architecture=["sm_80", "sm_90", "sm_100"])
def test_products_compile_to_wide_loads_without_spills(
    kind: InputName, scheme: str, architecture: str, tmp_path: Path
) -> None:
    clusters = architecture != "sm_80"
    projections = projections_of(wanted(kind, scheme), device="cpu")
    config = config_for(projections, clusters=clusters)
    memory = memory_of(torch.bfloat16, "cpu")
    compiled_for = step_config(projections, config, memory)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, compiled_for, architecture))
    assert_no_spills(cubin)
    assert_weight_rows_load_whole(cubin, config, projections.weight.dtype)


@by_pairs(
    name=["qkv", "o", "gate and up", "down"],
    scheme=["floats", "int8", "fp8", "int4 in 128"],
    sizes=[(4096, 14336), (8192, 28672)],
    is_dense=[False, True],
)
def test_models_compile_without_spills(
    name: str, scheme: str, sizes: tuple[int, int], is_dense: bool, tmp_path: Path
) -> None:
    hidden, intermediate = sizes
    products = {
        "qkv": Wanted("hidden", hidden, [hidden, 1024, 1024], SCHEMES[scheme]),
        "o": Wanted("attention", hidden, [hidden], SCHEMES[scheme]),
        "gate and up": Wanted("hidden", hidden, [intermediate] * 2, SCHEMES[scheme]),
        "down": Wanted("silu", intermediate, [hidden], SCHEMES[scheme]),
    }
    projections = replace(outlined(products[name]), is_dense=is_dense)
    config = config_for(projections, clusters=True)
    memory = memory_of(torch.bfloat16, "meta")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, step_config(projections, config, memory), "sm_90"))
    assert_no_spills(cubin)


@steps
def test_products_sum_over_the_kept_channels(
    device: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        emulate(monkeypatch, clusters=row["clusters"])
    kind, scheme, dtype = row["kind"], row["scheme"], row["dtype"]
    projections = projections_of(wanted(kind, scheme, dtype=dtype, bias=row["bias"]), device=device)
    config = None if row["config"] is None else _for(scheme, row["config"])
    is_dense = row["sparsity"] is None
    projections = replace(projections, is_dense=is_dense, config=config)
    _assert_right(projections, row["sparsity"], dtype, device)


@configs
@schemes
def test_every_tile_config_compiles_without_spills(
    scheme: str, config: TileConfig, tmp_path: Path
) -> None:
    projections = replace(
        projections_of(wanted("silu", scheme), device="cpu"), config=_for(scheme, config)
    )
    config = config_for(projections, clusters=True)
    cubin = tmp_path / "kernel.cubin"
    compiled_for = step_config(projections, config, memory_of(torch.bfloat16, "cpu"))
    cubin.write_bytes(compiled(SOURCE, compiled_for, "sm_90"))
    assert_no_spills(cubin)
    assert_weight_rows_load_whole(cubin, config, projections.weight.dtype)


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("chunk", [32, 96, 608])
def test_warps_share_the_only_group_of_int4_evenly(chunk: int, warps: int) -> None:
    projections = projections_of(wanted("attention", "int4 in 128"), device="cpu")
    assert projections.quant is not None and len(projections.quant.scales) == 1
    config = TileConfig(chunk=chunk, per_lane=8, warps_n=1, warps_k=warps, unroll=2, blocks=1)
    assert config_for(replace(projections, config=config), clusters=True).chunk % (32 * warps) == 0


@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("chunk", [32, 64, 96, 160, 608])
def test_chunks_are_whole_groups_or_parts_that_warps_share_evenly(chunk: int, warps: int) -> None:
    projections = projections_of(wanted("hidden", "int4 in 128"), device="cpu")
    assert projections.quant is not None and len(projections.quant.scales) > 1
    config = TileConfig(chunk=chunk, per_lane=8, warps_n=1, warps_k=warps, unroll=2, blocks=2)
    fitted = config_for(replace(projections, config=config), clusters=True)
    is_part = 128 % fitted.chunk == 0 and fitted.chunk % (32 * warps) == 0
    assert is_part or fitted.chunk % 128 == 0
    assert fitted.blocks == (1 if fitted.chunk > 128 * warps else 2)


@schemes
def test_a_product_gives_the_same_bits_twice_and_clears_sums_for_later(
    scheme: str, gpu: str
) -> None:
    source, _ = _source("hidden", torch.bfloat16, gpu)
    memory = memory_of(torch.bfloat16, gpu)
    projections = projections_of(wanted("hidden", scheme), [0.3, 0.5, 0.7], gpu)
    results = []
    for _ in range(3 if gpu == "cuda" else 2):
        sums = torch.zeros(sum(projections.output_sizes), dtype=torch.int64, device=gpu)
        clear = torch.full((2097,), 7, device=gpu)
        project(projections, source, sums, clear, memory, dependent=hopper())
        assert not clear.any()
        results.append(sums)
    assert all(torch.equal(results[0], again) for again in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_activation_equal_to_the_threshold_is_dropped(dtype: torch.dtype, gpu: str) -> None:
    # All of attention is in the first split, so nothing is rounded.
    source, _ = _source("attention", torch.float32, "cpu")
    x = source[0, :, 0, :HEAD_DIM].to(dtype).flatten().to(gpu)
    source = torch.zeros_like(source, device=gpu)
    source[0, :, 0, :HEAD_DIM] = x.view(HEADS, HEAD_DIM).float()
    source[..., HEAD_DIM] = -1e30
    source[:, :, 0, HEAD_DIM], source[:, :, 0, HEAD_DIM + 1] = 0.0, 1.0
    projections = projections_of(wanted("attention", dtype=dtype), [0.5], gpu)
    # A channel brings its activation to its own column.
    projections.weight.zero_().fill_diagonal_(1.0)
    memory = memory_of(dtype, gpu)
    for threshold in [0.0, *x[::16].abs().tolist()]:
        projections.thresholds.fill_(threshold)
        sums = torch.zeros(sum(projections.output_sizes), dtype=torch.int64, device=gpu)
        project(projections, source, sums, None, memory, dependent=hopper())
        expected = fixed(torch.where(x.abs() <= threshold, 0, x) * MULTIPLIER)
        assert torch.equal(sums[: len(x)], expected)


def test_every_projection_has_its_own_threshold(gpu: str) -> None:
    source, hidden = _source("hidden", torch.bfloat16, gpu)
    for scheme in ("floats", "int4 in 32"):
        projections = projections_of(wanted("hidden", scheme), device=gpu)
        projections = replace(projections, is_dense=False)
        x = normed(hidden, projections, torch.bfloat16)
        quantiles = (float(x.float().abs().quantile(sparsity)) for sparsity in (0.2, 0.9, 0.6))
        projections.thresholds.copy_(torch.tensor([in_a_gap(x, each) for each in quantiles]))
        exact = exact_product(projections, x)
        sums, memory = torch.zeros_like(exact).long(), memory_of(torch.bfloat16, gpu)
        project(
            replace(projections, is_dense=False), source, sums, None, memory, dependent=hopper()
        )
        error = (sums.double() * UNIT - exact * MULTIPLIER).abs().max()
        assert error <= torch.finfo(torch.bfloat16).eps / 8 * magnitude(projections, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_sums_that_overflow_set_the_flag_and_make_the_output_nan(value: float, gpu: str) -> None:
    memory = memory_of(torch.bfloat16, gpu)
    source, _ = _source("attention", torch.bfloat16, gpu)
    source[0, 1, 0, 5] = value
    projections = projections_of(wanted("attention"), [0.2], gpu)
    project(projections, source, memory.hidden, None, memory, dependent=hopper())
    assert memory.overflow.item() == 1
    position = torch.zeros(1, dtype=torch.int64, device=gpu)
    norm_weight = torch.ones(SIZES[0], device=gpu)
    final_norm(norm_weight, EPS, memory, position, dependent=hopper())
    assert memory.normed.isnan().all()


def test_shapes_of_these_tests_are_aligned_and_not_multiples_of_blocks() -> None:
    for in_features, output_sizes in SHAPES.values():
        assert in_features % ALIGNMENT == 0
        assert all(width % ALIGNMENT == 0 and width % 256 for width in output_sizes)
