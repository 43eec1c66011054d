import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels import reference

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda_compile import can_compile, compiled
from teal.kernels.cuda_step import (
    ALIGNMENT,
    SOURCE,
    UNIT,
    Input,
    Projections,
    StepMemory,
    cut_for,
    definitions_of,
    embed,
    final_norm,
    project,
)
from teal.kernels.cuda_strips import DTYPES

EPSILON = 1e-5
HEADS, SPLITS, HEAD_DIM = 4, 8, 32
# K and the widths of each input, odd in every way that is allowed.
SHAPES: dict[Input, tuple[int, list[int]]] = {
    "hidden": (584, [264, 24, 8]),
    "attention": (HEADS * HEAD_DIM, [584]),
    "silu": (1048, [584]),
    "gelu_pytorch_tanh": (200, [264]),
}

inputs = pytest.mark.parametrize("kind", SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _projections(
    kind: Input, dtype: torch.dtype, device: str, thresholds: Sequence[float], *, bias: bool = False
) -> Projections:
    in_features, widths = SHAPES[kind]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Projections(
        weight=(draw(in_features, sum(widths)) * 0.1).to(device, dtype),
        widths=widths,
        thresholds=torch.tensor([*thresholds, 0.0, 0.0][:3], device=device),
        input=kind,
        is_dense=max(thresholds) < 0,
        bias=draw(sum(widths)).to(device, dtype) if bias else None,
        gain=(1 + 0.1 * draw(in_features)).to(device) if kind == "hidden" else None,
        epsilon=EPSILON,
        multiplier=0.5,
    )


def _fixed(values: Tensor) -> Tensor:
    return (values.double() / UNIT).long()


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
        return _fixed(hidden).cuda(), hidden.cuda()
    both = torch.randn(2 * in_features, generator=generator)
    gate, up = both.chunk(2)
    return _fixed(both).cuda(), (reference.GATES[kind](gate) * up).to(dtype).cuda()


def _memory(dtype: torch.dtype, device: str = "cuda") -> StepMemory:
    parts = (HEADS, SPLITS, HEAD_DIM)
    return StepMemory(584, 296, 1048, parts, dtype, torch.device(device))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@inputs
def test_products_compile_to_wide_loads_without_spills(
    kind: Input, architecture: str, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the tools in triton's wheel")
    clusters = architecture != "sm_80"
    projections = _projections(kind, torch.bfloat16, "cpu", [0.5] * len(SHAPES[kind][1]))
    cut = cut_for(projections, clusters=clusters)
    definitions = definitions_of(
        projections, cut, _memory(torch.bfloat16, "cpu"), clusters=clusters
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, definitions, architecture))

    def told(option: str) -> str:
        command = [cuobjdump, option, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    used = told("--dump-resource-usage")
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", used)) == {"0"}
    wide = re.findall(r"LDG\.E\.NA\.128\.CONSTANT", told("--dump-sass"))
    assert len(wide) >= cut.unroll


def test_the_compiler_says_which_gpus_it_knows() -> None:
    assert can_compile((9, 0))
    assert not can_compile((3, 7))


def test_a_source_that_does_not_compile_is_shown_with_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)cuda_step.cu does not compile:\n.*CHUNK"):
        compiled(SOURCE, (), "sm_90")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.9, 1.0], ids=str)
@inputs
@dtypes
def test_products_are_those_of_the_kept_channels(
    kind: Input, dtype: torch.dtype, sparsity: float | None, bias: bool
) -> None:
    source, x = _source(kind, dtype)
    memory = _memory(dtype)
    projections = _projections(kind, dtype, "cuda", [-1.0] * len(SHAPES[kind][1]), bias=bias)
    if projections.gain is not None:
        factor = torch.rsqrt(x.square().mean() + EPSILON)
        x = ((x * factor).to(dtype).float() * projections.gain).to(dtype)
    if sparsity is not None:
        cuts = [float(x.float().abs().quantile(sparsity)) + part * 0.01 for part in range(3)]
        # A rounding error apart, an activation may fall on the other side.
        cuts = [_in_a_gap(x, cut) for cut in cuts]
        projections.thresholds.copy_(torch.tensor(cuts))
    expected = []
    columns = projections.weight.double().split(projections.widths, dim=1)
    for threshold, columns_of_part in zip(projections.thresholds.tolist(), columns, strict=False):
        kept = torch.where(x.float().abs() <= threshold, 0.0, x.double())
        expected.append(kept @ columns_of_part)
    exact = torch.cat(expected)
    if projections.bias is not None:
        exact = exact + projections.bias.double()
    sums = _fixed(torch.ones(len(exact))).cuda()
    project(projections, source, sums, None, memory, dependent=_hopper())
    result = sums.double() * UNIT - 1.0
    scale = (x.double().abs() @ projections.weight.double().abs()).max()
    assert (result - exact * 0.5).abs().max() <= torch.finfo(dtype).eps / 8 * scale
    assert not memory.overflow


@pytest.mark.gpu
def test_a_product_is_the_same_bits_twice_and_clears_sums_for_later() -> None:
    source, _ = _source("hidden", torch.bfloat16)
    memory = _memory(torch.bfloat16)
    projections = _projections("hidden", torch.bfloat16, "cuda", [0.3, 0.5, 0.7])
    results = []
    for _ in range(3):
        sums = torch.zeros(296, dtype=torch.int64, device="cuda")
        clear = torch.full((2097,), 7, device="cuda")
        project(projections, source, sums, clear, memory, dependent=_hopper())
        assert not clear.any()
        results.append(sums)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.parametrize("visible", [float("nan"), float("inf"), 3e38])
def test_what_does_not_fit_into_sums_sets_the_flag_and_makes_the_output_nan(visible: float) -> None:
    memory = _memory(torch.bfloat16)
    source, _ = _source("attention", torch.bfloat16)
    source[0, 1, 0, 5] = visible
    projections = _projections("attention", torch.bfloat16, "cuda", [0.2])
    project(projections, source, memory.hidden, None, memory, dependent=_hopper())
    assert memory.overflow.item() == 1
    final_norm(torch.ones(584, device="cuda"), EPSILON, memory, dependent=_hopper())
    assert memory.normed.isnan().all()


@pytest.mark.gpu
@dtypes
def test_a_step_begins_with_the_embedding_and_ends_with_the_norm(dtype: torch.dtype) -> None:
    memory = _memory(dtype)
    embedding = torch.randn(7, 584, device="cuda").to(dtype)
    gain = torch.rand(584, device="cuda")
    memory.overflow.fill_(1)
    embed(torch.tensor([3], device="cuda"), embedding, memory, 2.0, dependent=_hopper())
    assert not memory.overflow
    torch.testing.assert_close(memory.hidden.double() * UNIT, 2.0 * embedding[3].double())
    final_norm(gain, EPSILON, memory, dependent=_hopper())
    exact = 2.0 * F.rms_norm(embedding[3].double(), (584,), gain.double() / 2.0, EPSILON / 4)
    torch.testing.assert_close(
        memory.normed[0].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0
    )


def test_shapes_of_these_tests_are_aligned_and_not_multiples_of_blocks() -> None:
    for in_features, widths in SHAPES.values():
        assert in_features % ALIGNMENT == 0
        assert all(width % ALIGNMENT == 0 and width % 256 for width in widths)


def _in_a_gap(x: Tensor, cut: float) -> float:
    """Move a threshold into the middle between two neighbouring activations."""
    scores = torch.cat([x.float().abs().unique(), torch.tensor([1e4], device=x.device)])
    above = int(torch.searchsorted(scores, cut, right=True).clamp(1, len(scores) - 1))
    return float(scores[above - 1] + scores[above]) / 2


def _hopper() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)
