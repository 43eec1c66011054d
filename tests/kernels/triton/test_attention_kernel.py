"""Run on a GPU where there is one, else in Triton's interpreter, in a process of its own."""

import os

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_as_precise_as_torch, relative_error
from tests.kernels.cases import AttentionCase, assert_right_in_the_interpreter, attended

pytest.importorskip("triton")

from teal.kernels.triton.attention import TritonAttention, attend, attend_parts, splits_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts float32 to bfloat16 where the hardware rounds.
DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])
NAN = float("nan")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _case(*positions: int, **changes: object) -> AttentionCase:
    sizes = {"head_dim": 32, "rotary_dim": 32, "capacity": max(positions) + 3}
    return AttentionCase(positions=positions, **{**sizes, **changes})


CASES = {
    "first token": _case(0),
    "several sequences": _case(5, 0, 31, 17),
    "one key head": _case(9, kv_heads=1),
    "odd sharing": _case(70, heads=9, kv_heads=3),
    "window": _case(4, 70, 130, options={"window": 66}),
    "softcap": _case(9, options={"softcap": 2.0, "scale": 1.5}),
    "norms": _case(5, 11, with_norm_weights=True),
    "wide heads": _case(3, head_dim=64, rotary_dim=64),
}


def _given(case: AttentionCase, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, object]]:
    options = case.arguments(dtype)
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    return [tensor.to(DEVICE) for tensor in case.tensors(dtype)], moved


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the tests of this file itself")
@pytest.mark.slow
def test_kernels_are_right_in_the_interpreter() -> None:
    assert_right_in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@dtypes
def test_attention_is_as_precise_as_torch_and_appends(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    tensors, options = _given(case, dtype)
    exact, keys, values = attended(*tensors, **options)
    by_torch, _, _ = attended(*tensors, **options, dtype=dtype)
    before = [cache.clone() for cache in tensors[1:3]]
    assert_as_precise_as_torch(attend(*tensors, **options), by_torch, exact)
    for cache, old, new in zip(tensors[1:3], before, (keys, values), strict=True):
        for row, position in enumerate(case.positions):
            assert relative_error(cache[row, :, position], new[row]) <= torch.finfo(dtype).eps
            old[row, :, position] = cache[row, :, position]
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("position", [62, 63, 64, 65, 511, 512, 513])
def test_every_length_around_the_borders_of_splits_is_right(position: int) -> None:
    tensors, options = _given(_case(position, heads=2, kv_heads=1), torch.float32)
    exact, _, _ = attended(*tensors, **options)
    assert relative_error(attend(*tensors, **options), exact) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [8, 16, 32])
def test_any_number_of_splits_gives_the_same_attention(splits: int) -> None:
    tensors, options = _given(_case(200), torch.float32)
    parts = torch.full((1, 4, splits, 34), NAN, device=DEVICE)
    attend_parts(*tensors, parts, **options)
    factor = torch.exp(parts[..., 32:33] - parts[..., 32:33].amax(2, keepdim=True))
    result = (factor * parts[..., :32]).sum(2) / (factor * parts[..., 33:]).sum(2)
    exact, _, _ = attended(*tensors, **options)
    assert relative_error(result.view(1, -1), exact) < 1e-6


@pytest.mark.gpu
def test_nan_in_a_sequence_stays_visible_there_and_only_there() -> None:
    tensors, options = _given(_case(5, 6), torch.float32)
    tensors[0][1, 0] = NAN
    result = attend(*tensors, **options)
    assert result[0].isfinite().all()
    assert result[1].isnan().any()


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (_case(3, head_dim=64, rotary_dim=64), torch.bfloat16, None),
        (_case(3, head_dim=96, rotary_dim=96), torch.bfloat16, "head_dim is not a power of two"),
        (_case(3, head_dim=16, rotary_dim=16), torch.bfloat16, "of at least 32"),
        (_case(3, head_dim=128, rotary_dim=64), torch.bfloat16, "rotates a part"),
        (_case(3), torch.float64, "qkv is not bfloat16"),
    ],
    ids=["whole heads", "96", "16", "partial rotary", "float64"],
)
def test_it_says_which_heads_it_does_not_compute(
    case: AttentionCase, dtype: torch.dtype, reason: str | None
) -> None:
    said = TritonAttention().can_run(*case.tensors(dtype))
    assert (said is None) if reason is None else (said is not None and reason in said)


def test_longer_contexts_are_split_further() -> None:
    assert [splits_for(capacity) for capacity in (16, 2048, 4096, 131072)] == [8, 8, 16, 32]
