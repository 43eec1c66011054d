import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal.kernels import reference

pytest.importorskip("cuda.bindings")

from compiling import assert_no_spills, told
from stepping import (
    EPSILON,
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
    magnitude,
    memory_of,
    normed,
    outlined,
    projections_of,
    thresholds_at,
)

from teal.kernels.cuda_compile import compiled
from teal.kernels.cuda_ends import finish
from teal.kernels.cuda_step import (
    ALIGNMENT,
    SOURCE,
    UNIT,
    Input,
    cut_for,
    definitions_of,
    project,
)
from teal.kernels.cuda_strips import DTYPES

# K and the widths of each input, odd in every way that is allowed for weights of 16 bits.
SHAPES: dict[Input, tuple[int, list[int]]] = {
    "hidden": (584, [264, 24, 8]),
    "attention": (HEADS * HEAD_DIM, [584]),
    "silu": (1048, [584]),
    "gelu_pytorch_tanh": (200, [264]),
}
# The same for every format.
ALIGNED: dict[Input, tuple[int, list[int]]] = {
    "hidden": (584, [288, 32, 32]),
    "attention": (HEADS * HEAD_DIM, [608]),
    "silu": (1048, [1056]),
    "gelu_pytorch_tanh": (200, [288]),
}

inputs = pytest.mark.parametrize("kind", SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def wanted(kind: Input, scheme: str = "floats", **changes: object) -> Wanted:
    in_features, widths = (SHAPES if scheme == "floats" else ALIGNED)[kind]
    return replace(Wanted(kind, in_features, widths, SCHEMES[scheme]), **changes)  # type: ignore[arg-type]


def _source(kind: Input, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what an input is made from, and the activations that it makes, (K,)."""
    in_features, _ = SHAPES[kind]
    generator = torch.Generator().manual_seed(2)
    if kind == "attention":
        parts = torch.randn(1, HEADS, SPLITS, HEAD_DIM + 2, generator=generator)
        parts[..., -1] = parts[..., -1].exp()
        parts[:, 0, 3:, HEAD_DIM], parts[:, 0, 3:, HEAD_DIM + 1] = -1e30, 0.0
        factor = torch.exp(parts[..., -2:-1] - parts[..., -2:-1].amax(2, keepdim=True))
        weights = (factor * parts[..., -1:]).sum(2)
        x = ((factor * parts[..., :HEAD_DIM]).sum(2) / weights).flatten()
        return parts.cuda(), x.to(dtype).cuda()
    if kind == "hidden":
        hidden = 3 * torch.randn(in_features, generator=generator)
        return fixed(hidden).cuda(), hidden.cuda()
    both = torch.randn(2 * in_features, generator=generator)
    gate, up = both.chunk(2)
    return fixed(both).cuda(), (reference.GATES[kind](gate) * up).to(dtype).cuda()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@inputs
@schemes
def test_products_compile_to_wide_loads_without_spills(
    kind: Input, scheme: str, architecture: str, tmp_path: Path
) -> None:
    clusters = architecture != "sm_80"
    projections = projections_of(wanted(kind, scheme), device="cpu")
    cut = cut_for(projections, clusters=clusters)
    memory = memory_of(torch.bfloat16, "cpu")
    definitions = definitions_of(projections, cut, memory, clusters=clusters)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, definitions, architecture))
    assert_no_spills(cubin)
    bits = 64 if scheme.startswith("int4") else 128
    wide = re.findall(rf"LDG\.E\.NA\.{bits}\.CONSTANT", told(cubin, "--dump-sass"))
    assert len(wide) >= cut.unroll


@pytest.mark.parametrize("sizes", [(4096, 14336), (8192, 28672)], ids=["8B", "70B"])
@pytest.mark.parametrize("scheme", ["floats", "int8", "fp8", "int4 in 128"])
def test_models_compile_without_spills(scheme: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    hidden, intermediate = sizes
    products = (
        Wanted("hidden", hidden, [hidden, 1024, 1024], SCHEMES[scheme]),
        Wanted("attention", hidden, [hidden], SCHEMES[scheme]),
        Wanted("hidden", hidden, [intermediate] * 2, SCHEMES[scheme]),
        Wanted("silu", intermediate, [hidden], SCHEMES[scheme]),
    )
    for product in products:
        projections = outlined(product)
        cut = cut_for(projections, clusters=True)
        memory = memory_of(torch.bfloat16, "meta")
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(
            compiled(SOURCE, definitions_of(projections, cut, memory, clusters=True), "sm_90")
        )
        assert_no_spills(cubin)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.9, 1.0], ids=str)
@schemes
@inputs
@dtypes
def test_products_are_those_of_the_kept_channels(
    kind: Input, dtype: torch.dtype, scheme: str, sparsity: float | None, bias: bool
) -> None:
    source, x = _source(kind, dtype)
    memory = memory_of(dtype)
    projections = projections_of(wanted(kind, scheme, dtype=dtype, bias=bias))
    if projections.gain is not None:
        x = normed(x, projections, dtype)
    if sparsity is not None:
        projections.thresholds.copy_(torch.tensor(thresholds_at(x, sparsity, 3)))
    exact = exact_product(projections, x)
    sums = fixed(torch.ones(len(exact))).cuda()
    project(projections, source, sums, None, memory, dependent=hopper())
    error = (sums.double() * UNIT - 1.0 - exact * MULTIPLIER).abs().max()
    assert error <= torch.finfo(dtype).eps / 8 * magnitude(projections, x)
    assert not memory.overflow


@pytest.mark.gpu
@schemes
def test_a_product_is_the_same_bits_twice_and_clears_sums_for_later(scheme: str) -> None:
    source, _ = _source("hidden", torch.bfloat16)
    memory = memory_of(torch.bfloat16)
    projections = projections_of(wanted("hidden", scheme), [0.3, 0.5, 0.7])
    results = []
    for _ in range(3):
        sums = torch.zeros(sum(projections.widths), dtype=torch.int64, device="cuda")
        clear = torch.full((2097,), 7, device="cuda")
        project(projections, source, sums, clear, memory, dependent=hopper())
        assert not clear.any()
        results.append(sums)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.parametrize("visible", [float("nan"), float("inf"), 3e38])
def test_what_does_not_fit_into_sums_sets_the_flag_and_makes_the_output_nan(visible: float) -> None:
    memory = memory_of(torch.bfloat16)
    source, _ = _source("attention", torch.bfloat16)
    source[0, 1, 0, 5] = visible
    projections = projections_of(wanted("attention"), [0.2])
    project(projections, source, memory.hidden, None, memory, dependent=hopper())
    assert memory.overflow.item() == 1
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    finish(torch.ones(SIZES[0], device="cuda"), EPSILON, memory, position, dependent=hopper())
    assert memory.normed.isnan().all()


def test_shapes_of_these_tests_are_aligned_and_not_multiples_of_blocks() -> None:
    for in_features, widths in SHAPES.values():
        assert in_features % ALIGNMENT == 0
        assert all(width % ALIGNMENT == 0 and width % 256 for width in widths)
