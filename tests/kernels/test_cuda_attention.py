import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cases import attended, draw
from torch import Tensor

pytest.importorskip("cuda.bindings")

from stepping import (
    MULTIPLIER,
    SCHEMES,
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

from teal.kernels.cuda_attention import (
    SOURCE,
    Attention,
    attend_and_project,
    can_attend,
    definitions_of,
)
from teal.kernels.cuda_compile import compiled
from teal.kernels.cuda_step import UNIT, StepMemory
from teal.kernels.cuda_strips import DTYPES

HIDDEN = 640
# Hidden size, heads, key heads and channels of a head.
MODELS = {
    "Llama-3-8B": (4096, 32, 8, 128),
    "Llama-2-7B": (4096, 32, 32, 128),
    "Llama-3-70B": (8192, 64, 8, 128),
}
# Query heads per key head, key heads and channels of a head.
SHARINGS = [
    (1, 2, 64),
    (1, 10, 32),
    (2, 2, 128),
    (2, 1, 32),
    (3, 1, 256),
    (3, 3, 32),
    (4, 2, 32),
    (4, 1, 256),
    (5, 1, 64),
    (7, 1, 128),
    (8, 2, 128),
    (8, 1, 32),
]

schemes = pytest.mark.parametrize("scheme", SCHEMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Case:
    """One launch: a stream, what is cached of it, and a layer."""

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    position: int = 37
    scheme: str = "floats"
    dtype: torch.dtype = torch.bfloat16
    sparsity: float | None = None
    bias: bool = False
    norms: bool = False
    window: int = 0
    softcap: float = 0.0

    def attention(self, device: str = "cuda", hidden: int = HIDDEN) -> Attention:
        """Draw the layer, dense."""
        scheme, widths = SCHEMES[self.scheme], self.widths
        qkv = Wanted("hidden", hidden, widths, scheme, self.dtype, self.bias)
        o = Wanted("attention", widths[0], [hidden], scheme, self.dtype, self.bias, seed=3)
        gains = [1 + 0.3 * draw(self.head_dim, seed=seed).to(device) for seed in (3, 4)]
        return Attention(
            qkv=projections_of(qkv, device=device),
            o=projections_of(o, device=device),
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
            q_gain=gains[0] if self.norms else None,
            k_gain=gains[1] if self.norms else None,
            epsilon=1e-3,
        )

    @property
    def widths(self) -> Sequence[int]:
        """Columns of q, k and v."""
        kv_size = self.kv_heads * self.head_dim
        return [self.heads * self.head_dim, kv_size, kv_size]

    def cache(self) -> list[Tensor]:
        """Draw keys, values, position, cosines and sines; NaN where nothing is cached."""
        shape = (1, self.kv_heads, self.position + 3, self.head_dim)
        both = [draw(*shape, dtype=self.dtype, seed=seed).cuda() for seed in (5, 6)]
        for rows in both:
            rows[:, :, self.position :] = float("nan")
        inverse = 100.0 ** -torch.linspace(0, 1, self.head_dim // 2)
        angles = torch.arange(self.position + 5)[:, None] * inverse
        return [
            *both,
            torch.tensor([self.position]).cuda(),
            angles.cos().cuda(),
            angles.sin().cuda(),
        ]


@pytest.fixture(autouse=True)
def _needs_clusters(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not hopper():
        pytest.skip("needs a GPU with clusters")


def assert_right(case: Case) -> None:
    """Compare the stream and the cache with float64."""
    attention, cache, memory = case.attention(), case.cache(), memory_of(case.dtype)
    stream = stream_of(memory)
    inner, key, value = exact_attended(case, attention, cache, stream)
    before = [rows.clone() for rows in cache[:2]]
    run(attention, cache, memory)
    assert memory.complete == 1
    change = memory.stream.double() * UNIT - stream.double()
    error = change - exact_product(attention.o, inner) * MULTIPLIER
    # Sums of q, k and v err by little, which may still round an activation the other way.
    eps = torch.finfo(case.dtype).eps
    assert error.abs().max() <= eps / 4 * magnitude(attention.o, inner)
    assert not memory.overflow
    assert not memory.hidden[2].any()
    for rows, old, new in zip(cache[:2], before, (key, value), strict=True):
        appended = rows[0, :, case.position]
        assert (appended.double() - new[0].double()).abs().max() <= 2 * eps * new.abs().max()
        old[0, :, case.position] = appended
        torch.testing.assert_close(rows, old, rtol=0, atol=0, equal_nan=True)


def exact_attended(
    case: Case, attention: Attention, cache: Sequence[Tensor], stream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the thresholds; return the input of o, (heads · head_dim,), and the new key and value."""
    qkv, o, dtype = attention.qkv, attention.o, case.dtype
    x = normed(stream, qkv, dtype)
    if case.sparsity is not None:
        qkv.thresholds.copy_(torch.tensor(thresholds_at(x, case.sparsity, 3)))
    result, key, value = attended(
        exact_product(qkv, x).to(dtype)[None],
        *cache,
        scale=attention.scale,
        window=case.window,
        softcap=case.softcap,
        q_gain=attention.q_gain,
        k_gain=attention.k_gain,
        epsilon=attention.epsilon,
    )
    inner = result[0].to(dtype)
    if case.sparsity is not None and case.sparsity < 1.0:
        o.thresholds.fill_(in_the_widest_gap(inner, case.sparsity))
    return inner, key, value


def in_the_widest_gap(x: Tensor, sparsity: float) -> float:
    """Return a threshold that rounding q, k or v the other way carries no value across."""
    scores = x.float().abs().sort().values
    first, last = (int(len(scores) * (sparsity + by)) for by in (-0.15, 0.15))
    scores = scores[max(0, first) : last]
    below = int(scores.diff().argmax())
    return float(scores[below] + scores[below + 1]) / 2


def stream_of(memory: StepMemory) -> Tensor:
    """Fill the stream, and what is to be cleared and not read."""
    stream = 3 * draw(HIDDEN, seed=2).cuda()
    memory.stream.copy_(fixed(stream))
    memory.hidden[2].fill_(7)
    return stream


def run(attention: Attention, cache: Sequence[Tensor], memory: StepMemory) -> None:
    # The cache is read before the launch in front has ended.
    torch.cuda.synchronize()
    attend_and_project(attention, *cache, memory, dependent=True)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.8, 1.0], ids=str)
@schemes
@dtypes
def test_the_stream_gains_what_the_kept_channels_attend_to(
    dtype: torch.dtype, scheme: str, sparsity: float | None, bias: bool
) -> None:
    assert_right(Case(scheme=scheme, dtype=dtype, sparsity=sparsity, bias=bias))


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "kv_heads", "head_dim"), SHARINGS)
def test_query_heads_share_key_heads_in_any_way(queries: int, kv_heads: int, head_dim: int) -> None:
    assert_right(Case(queries * kv_heads, kv_heads, head_dim, position=70, sparsity=0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [32, 64, 128], ids=["4 blocks", "2 blocks", "1 block"])
@schemes
def test_many_key_heads_have_small_clusters(scheme: str, kv_heads: int) -> None:
    assert_right(Case(kv_heads, kv_heads, 32, position=300, scheme=scheme, sparsity=0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("turns", [1, 4, 5, 8])
@pytest.mark.parametrize("beyond", [-2, -1, 0, 1])
def test_every_position_around_the_borders_of_turns_is_right(turns: int, beyond: int) -> None:
    assert_right(Case(4, 1, 128, position=256 * turns + beyond))


@pytest.mark.gpu
@pytest.mark.parametrize("position", [0, 1, 2, 15, 31, 32, 33, 63, 64, 127, 8191])
def test_short_and_long_contexts_are_right(position: int) -> None:
    assert_right(Case(4, 1, 128, position=position))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 500])
def test_a_window_covers_the_newest_positions(window: int) -> None:
    assert_right(Case(position=90, window=window))
    assert_right(Case(position=10, window=window))


@pytest.mark.gpu
@dtypes
def test_heads_are_normed_and_scores_end_smoothly(dtype: torch.dtype) -> None:
    assert_right(Case(dtype=dtype, norms=True))
    assert_right(Case(dtype=dtype, softcap=2.0))
    everything = Case(dtype=dtype, norms=True, softcap=3.0, window=7, bias=True, sparsity=0.5)
    assert_right(everything)


@pytest.mark.gpu
@schemes
def test_the_same_bits_come_out_again(scheme: str) -> None:
    case = Case(scheme=scheme, position=1000)
    attention = case.attention()
    attention.qkv.thresholds.fill_(0.6)
    attention.o.thresholds.fill_(0.1)
    results = []
    for _ in range(3):
        memory = memory_of(case.dtype)
        stream_of(memory)
        run(attention, case.cache(), memory)
        results.append(memory.stream)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["weight", "cache"])
def test_nan_sets_the_flag(place: str) -> None:
    case = Case()
    attention, cache, memory = case.attention(), case.cache(), memory_of(case.dtype)
    if place == "weight":
        attention.qkv.weight[5, 7] = float("nan")
    else:
        cache[0][0, 1, 9, 3] = float("nan")
    stream_of(memory)
    run(attention, cache, memory)
    assert memory.overflow.item() == 1


@pytest.mark.gpu
def test_a_captured_launch_appends_token_after_token_as_an_eager_one() -> None:
    case = Case(position=30)
    attention = case.attention()
    streams = []
    for is_captured in (False, True):
        cache, memory = case.cache(), memory_of(case.dtype)
        step = _step(attention, cache, memory)
        torch.cuda.synchronize()
        if is_captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(3):
            step()
            streams.append(memory.hidden[1].clone())
        assert cache[2].item() == 33
        assert cache[0].isfinite().all()
    assert torch.equal(torch.stack(streams[:3]), torch.stack(streams[3:]))
    assert not torch.equal(streams[0], streams[1])


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
@schemes
def test_models_compile_to_wide_loads_without_spills(
    scheme: str, sizes: tuple[int, int, int, int], architecture: str, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the tools in triton's wheel")
    attention = outlined_attention(*sizes, scheme)
    assert can_attend(attention)
    definitions = definitions_of(attention, memory_of(torch.bfloat16, "cpu"))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, definitions, architecture))

    def told(option: str) -> str:
        command = [cuobjdump, option, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    used = told("--dump-resource-usage")
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", used)) == {"0"}
    sass = told("--dump-sass")
    # Of q, of k and v, and of o.
    assert len(re.findall(r"LDG\.E\.NA\.128\.CONSTANT", sass)) >= 3 * attention.cut.unroll
    assert re.search(r"LDGSTS\.E\.BYPASS\.128", sass)


@schemes
def test_blocks_share_channels_by_whole_groups_of_scales(scheme: str) -> None:
    for sizes in (*MODELS.values(), (640, 8, 2, 64), (584, 4, 2, 32), (2560, 32, 8, 64)):
        attention = outlined_attention(*sizes, scheme)
        chunk, grid = attention.cut.chunk, attention.qkv.grid
        assert chunk * attention.cluster >= sizes[0]
        assert chunk % 32 == 0
        if grid is not None and len(grid.scales) > 1:
            assert chunk % grid.group_size == 0 or grid.group_size % chunk == 0


def test_clusters_fill_a_gpu_as_far_as_powers_of_two_do() -> None:
    blocks = {
        kv_heads: outlined_attention(4096, kv_heads, kv_heads, 64).cluster
        for kv_heads in (1, 8, 10, 32, 40, 128, 256)
    }
    assert blocks == {1: 16, 8: 16, 10: 8, 32: 4, 40: 2, 128: 1, 256: 1}


@pytest.mark.parametrize(
    ("sizes", "scheme", "is_possible"),
    [
        ((4096, 32, 8, 128), "floats", True),
        ((4096, 40, 8, 96), "floats", False),
        ((4096, 64, 1, 128), "floats", False),
        ((3584, 28, 4, 128), "int8", True),
        ((3584, 28, 4, 128), "int4 in 128", False),
        ((16384, 128, 8, 128), "int8", True),
        ((16384, 128, 8, 128), "int4 in 128", False),
        ((8 * 509, 32, 8, 128), "floats", False),
    ],
    ids=[
        "Llama-3-8B",
        "heads of 96",
        "many query heads",
        "7 query heads",
        "channels of a block across groups",
        "405B",
        "more scales than shared memory",
        "a prime number of loads",
    ],
)
def test_only_what_fits_is_attended_to(
    sizes: tuple[int, int, int, int], scheme: str, is_possible: bool
) -> None:
    assert can_attend(outlined_attention(*sizes, scheme)) is is_possible


def test_unlike_formats_are_not_fused() -> None:
    attention = outlined_attention(4096, 32, 8, 128, "int8")
    floats = outlined_attention(4096, 32, 8, 128).o
    assert not can_attend(replace(attention, o=floats))


def outlined_attention(
    hidden: int, heads: int, kv_heads: int, head_dim: int, scheme: str = "floats"
) -> Attention:
    """Return a layer of the right sizes without numbers."""
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    return Attention(
        qkv=outlined(Wanted("hidden", hidden, widths, SCHEMES[scheme])),
        o=outlined(Wanted("attention", widths[0], [hidden], SCHEMES[scheme])),
        head_dim=head_dim,
        scale=1.0,
    )


def _step(
    attention: Attention, cache: Sequence[Tensor], memory: StepMemory
) -> Callable[[], object]:
    start = fixed(3 * draw(HIDDEN, seed=2)).cuda()

    def step() -> None:
        memory.complete = 0
        memory.hidden[0].copy_(start)
        memory.hidden[1].zero_()
        attend_and_project(attention, *cache, memory, dependent=True)
        cache[2].add_(1)

    return step
