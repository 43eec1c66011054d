from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_error
from tests.kernels.cases import AttentionCase

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.attention import (
    SOURCE,
    Attention,
    attend,
    attention_config,
    can_attend,
    splits_for,
)
from teal.kernels.cuda.decode_step import StepMemory
from teal.kernels.cuda.nvrtc import compiled
from teal.kernels.cuda.tile_config import DTYPES
from teal.kernels.reference.attention import attend as reference_attend
from teal.kernels.reference.attention import placed
from tests.kernels.compiling import assert_no_spills, dumped
from tests.kernels.emulation import DEVICE, emulate
from tests.kernels.stepping import fixed, hopper
from tests.pairwise import by_pairs

NAN = float("nan")
SPLITS = 8
# For sums in float32 and softmax weights with twice the digits of the activations.
TOLERANCE = 2e-5
# Query heads per key head and channels of a head.
SHAPES = [(4, 128), (1, 128), (8, 128), (16, 128), (7, 64), (9, 64), (8, 256), (4, 80), (1, 96)]


def _case(
    position: int, *, queries: int = 2, head_dim: int = 64, **changes: object
) -> AttentionCase:
    sizes = {"heads": 2 * queries, "kv_heads": 2, "head_dim": head_dim, "rotary_dim": head_dim}
    case = AttentionCase(positions=(position,), capacity=position + 3, **sizes)
    return replace(case, **changes)  # type: ignore[arg-type]


CASES = {
    "first token": _case(0),
    "norms": _case(11, with_norm_weights=True),
    "softcap": _case(90, options={"softcap": 2.0, "scale": 1.5}),
    "everything": _case(
        200,
        head_dim=96,
        with_norm_weights=True,
        options={"softcap": 3.0, "window": 70, "scale": 1.0},
    ),
    **{
        f"{queries} heads of {dim}": _case(300, queries=queries, head_dim=dim)
        for queries, dim in SHAPES
    },
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Call:
    """A call of the kernel and its operands; everything that it must not read is NaN."""

    def __init__(self, case: AttentionCase, dtype: torch.dtype, splits: int = SPLITS) -> None:
        qkv, *tensors = (tensor.to(DEVICE) for tensor in case.tensors(dtype))
        options = case.arguments(dtype)
        self.qkv, self.cache, self.position = qkv, tensors, case.positions[0]
        self.options = {
            name: value.float().to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        if not case.with_norm_weights:
            tensors[3:] = _quarter_turns(tensors[3])
        self.first = max(0, self.position + 1 - options.get("window", self.position + 1))
        for rows in self.cache[:2]:
            rows[:, :, : self.first] = NAN
        parts = (case.heads, splits, case.head_dim)
        self.memory = StepMemory(8, qkv.shape[1], 8, parts, dtype, qkv.device)
        # The kernel rounds these sums to exactly the activations.
        self.memory.qkv.copy_(fixed(case.tensors(torch.float32)[0][0]))
        self.memory.parts.fill_(NAN)

    def run(self) -> Tensor:
        """Return the combined result of the splits in float64, (heads, head_dim)."""
        # The cache is read before the previous launch has ended.
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        attend(Attention(**self.options), *self.cache, self.memory, dependent=hopper())
        parts = self.memory.parts[0].double()
        totals, largest, weights = parts.split([parts.shape[-1] - 2, 1, 1], dim=-1)
        factors = torch.exp(largest - largest.amax(1, keepdim=True))
        return (factors * totals).sum(1) / (factors * weights).sum(1)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention in float64 and the cache after it.

        Queries and keys are rounded as in the reference.
        """
        keys, values, positions, *angles = self.cache
        keys, values = keys.clone(), values.clone()
        reference_attend(self.qkv, keys, values, positions, *angles, **self.options)
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        q = self.qkv.view(-1, head_dim)[: -2 * kv_heads]
        norm_weight, eps = self.options.get("q_norm_weight"), self.options.get("eps", 0.0)
        q = placed(q, norm_weight, eps, *(table[positions] for table in angles))
        covered = slice(self.first, self.position + 1)
        scores = q.view(kv_heads, -1, head_dim).double() @ keys[0, :, covered].double().mT
        scores *= self.options["scale"]
        if softcap := self.options.get("softcap"):
            scores = softcap * torch.tanh(scores / softcap)
        attended = scores.softmax(-1) @ values[0, :, covered].double()
        return attended.view(-1, head_dim), keys, values


def _assert_right(
    case: AttentionCase, dtype: torch.dtype = DTYPES[0], splits: int = SPLITS
) -> None:
    call = Call(case, dtype, splits)
    expected, keys, values = call.exact()
    result = call.run()
    if case.with_norm_weights:
        # An entry of a query or key may round to its neighbour.
        eps = torch.finfo(dtype).eps
        assert relative_error(result, expected) < eps / 8
        new_key, expected_key = call.cache[0][:, :, call.position], keys[:, :, call.position]
        assert relative_error(new_key, expected_key) < eps
        new_key.copy_(expected_key)
    else:
        assert relative_error(result, expected) < TOLERANCE
    torch.testing.assert_close(call.cache[0], keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(call.cache[1], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@dtypes
def test_attention_equals_that_in_float64_and_appends_to_the_cache(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    _assert_right(case, dtype)


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_attention_is_right_on_an_emulated_gpu(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, clusters=True)
    _assert_right(list(CASES.values())[number], DTYPES[number % len(DTYPES)])


def test_lengths_around_tile_borders_are_right_on_an_emulated_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulate(monkeypatch, clusters=False)
    for position in (1, 15, 16, 17, 127, 128, 129, 511, 512, 513):
        _assert_right(_case(position), torch.float16)
    for window in (1, 16, 17, 129):
        _assert_right(_case(700, options={"window": window}), splits=3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "position", [1, 14, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 3000]
)
def test_lengths_around_the_borders_of_tiles_and_strides_are_right(position: int) -> None:
    _assert_right(_case(position))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 128, 129, 600])
def test_a_window_covers_the_newest_positions(window: int) -> None:
    for position in (10, 90, 700):
        _assert_right(_case(position, options={"window": window}))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3, 16, 32])
def test_any_number_of_splits_gives_the_same_attention(splits: int) -> None:
    _assert_right(_case(600), splits=splits)


@pytest.mark.gpu
def test_a_split_without_positions_has_no_weight() -> None:
    call = Call(_case(31), torch.bfloat16)
    call.run()
    empty = call.memory.parts[0, :, 2:]
    assert not empty[..., :-2].any()
    assert not empty[..., -1].any()
    torch.testing.assert_close(empty[..., -2], torch.full_like(empty[..., -2], -1e30))


@pytest.mark.gpu
def test_attention_gives_the_same_bits_again() -> None:
    calls = [Call(_case(777), torch.bfloat16) for _ in range(3)]
    for call in calls:
        call.run()
    assert torch.equal(calls[0].memory.parts, calls[1].memory.parts)
    assert torch.equal(calls[0].memory.parts, calls[2].memory.parts)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [0, 1], ids=["key", "value"])
def test_nan_in_the_cache_shows_in_the_heads_that_read_it_and_only_there(
    cache: int,
) -> None:
    call = Call(_case(300), torch.bfloat16)
    call.cache[cache][0, 1, 40, 5] = NAN
    first, second = call.run().chunk(2)
    assert first.isfinite().all()
    assert second.isnan().any(dim=1).all()


@pytest.mark.gpu
def test_a_captured_launch_appends_tokens_as_an_eager_one_does() -> None:
    results = []
    for is_captured in (False, True):
        call = Call(_case(30, capacity=40), torch.bfloat16)
        step = _step(call)
        if is_captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(5):
            step()
            torch.cuda.synchronize()
            results.append(call.memory.parts.clone())
        assert call.cache[0][:, :, :36].isfinite().all()
        assert call.cache[0][:, :, 36:].isnan().all()
    assert torch.equal(torch.stack(results[:5]), torch.stack(results[5:]))
    assert not torch.equal(results[0], results[1])


@by_pairs(
    architecture=["sm_80", "sm_90", "sm_100"], shape=SHAPES, dtype=list(DTYPES), softcap=[2.0, 0.0]
)
def test_heads_of_models_compile_without_spills(
    architecture: str, shape: tuple[int, int], dtype: torch.dtype, softcap: float, tmp_path: Path
) -> None:
    queries, head_dim = shape
    norm_weight = torch.ones(head_dim)
    attention = Attention(
        scale=1.0, softcap=softcap, q_norm_weight=norm_weight, k_norm_weight=norm_weight
    )
    assert_no_spills(_cubin(tmp_path, queries, head_dim, architecture, dtype, attention))


@dtypes
def test_attention_without_norms_compiles_without_spills(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    assert_no_spills(_cubin(tmp_path, 4, 128, "sm_90", dtype))


def test_the_first_tile_is_loaded_in_wide_loads_before_the_wait(tmp_path: Path) -> None:
    sass = dumped(_cubin(tmp_path, 4, 128, "sm_90"), "--dump-sass")
    before, _, after = sass.partition("ACQBULK")
    # Four loads of each of two keys, two of each of four values.
    assert before.count("LDG.E.128.STRONG.GPU") == 16
    # The sums of the projections are loaded only after the wait.
    assert not before.count("LDG.E.64")
    assert after.count("LDG.E.64")


def test_only_heads_that_fit_and_that_rope_covers_whole_are_computed() -> None:
    tables = {dim: torch.zeros(4, dim // 2) for dim in (40, 64, 80, 96, 128, 256, 512)}
    for queries, head_dim in SHAPES:
        assert can_attend(2 * queries, 2, head_dim, tables[head_dim])
    assert not can_attend(32, 1, 64, tables[64])
    assert not can_attend(16, 1, 256, tables[256])
    assert not can_attend(8, 8, 512, tables[512])
    assert not can_attend(8, 8, 40, tables[40])
    assert not can_attend(8, 8, 128, tables[64])


def test_longer_contexts_are_split_further() -> None:
    splits = [splits_for(capacity) for capacity in (1, 2048, 2304, 4096, 131072)]
    assert splits == [4, 8, 16, 16, 32]


def _cubin(
    folder: Path,
    queries: int,
    head_dim: int,
    architecture: str,
    dtype: torch.dtype = torch.bfloat16,
    attention: Attention | None = None,
) -> Path:
    keys = torch.empty(1, 2, 8, head_dim, dtype=dtype, device="meta")
    memory = StepMemory(8, 8, 8, (2 * queries, SPLITS, head_dim), dtype, torch.device("meta"))
    config = attention_config(attention or Attention(scale=1.0), keys, memory)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled(SOURCE, config, architecture))
    return cubin


def _quarter_turns(table: Tensor) -> list[Tensor]:
    """Return cosines and sines of the shape of a table that need no rounding."""
    positions, pairs = (torch.arange(size, device=table.device) for size in table.shape)
    turns = positions[:, None] + pairs
    quarters = torch.tensor([1.0, 0.0, -1.0, 0.0], device=table.device)
    return [quarters[turns % 4], quarters[(turns + 3) % 4]]


def _step(call: Call) -> Callable[[], object]:
    def step() -> None:
        # It must not begin before the previous launch has ended, which advances the position.
        attend(Attention(**call.options), *call.cache, call.memory, dependent=False)
        call.cache[2].add_(1)

    # Compile before capturing.
    step()
    return step
