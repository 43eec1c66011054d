"""Attention by every backend is that of torch. That of the fused step: cuda/test_attention.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.attention_cases import assert_attends, given
from tests.kernels.backends import FLOATS, INTERPRETED
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, attended

try:
    from teal.kernels.cpu.attention import NumbaAttention
except ImportError:
    NumbaAttention = None  # type: ignore[assignment, misc]
try:
    from teal.kernels.triton import attention as triton_attention
except ImportError:
    triton_attention = None  # type: ignore[assignment]

INF, NAN = float("inf"), float("nan")

ON_TRITON = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts float32 to bfloat16 where the hardware rounds.
DTYPES: Mapping[str, Sequence[torch.dtype]] = {
    "cpu": FLOATS,
    "triton": FLOATS[:2] if INTERPRETED else FLOATS,
}


def _wide(*positions: int, **changes: Any) -> AttentionCase:
    sizes = {"head_dim": 32, "rotary_dim": 32, "capacity": max(positions) + 3}
    return AttentionCase(positions=positions, **{**sizes, **changes})


CASES: Mapping[str, AttentionCase] = {
    **ATTENTION_CASES,
    "first token of wide heads": _wide(0),
    "several sequences of wide heads": _wide(5, 0, 31, 17),
    "one wide key head": _wide(9, kv_heads=1),
    "odd sharing of wide heads": _wide(70, heads=9, kv_heads=3),
    "window over wide heads": _wide(4, 70, 130, options={"window": 66}),
    "softcap of wide heads": _wide(9, options={"softcap": 2.0, "scale": 1.5}),
    "norms of wide heads": _wide(5, 11, with_norm_weights=True),
    "heads of 64": _wide(3, head_dim=64, rotary_dim=64),
}


def _attend(name: str) -> tuple[Callable[..., Tensor], Callable[..., str | None], str]:
    """Return how a backend attends, what it cannot, and its device."""
    if name == "cpu":
        return NumbaAttention().run, NumbaAttention().can_run, "cpu"
    return triton_attention.attend, triton_attention.TritonAttention().can_run, ON_TRITON


def _here() -> Iterator[str]:
    """Return the backends whose tests this process collects."""
    if NumbaAttention is not None and not INTERPRETED:
        yield "cpu"
    if triton_attention is not None:
        yield "triton"


def _params() -> list[Any]:
    """Return backend, case and dtype wherever the backend can compute the case."""
    params = []
    for name in _here():
        _, can_run, _ = _attend(name)
        for label, case in CASES.items():
            for dtype in DTYPES[name]:
                if can_run(*case.tensors(dtype)) is None:
                    marks = [pytest.mark.gpu] if name == "triton" else []
                    params.append(
                        pytest.param(name, case, dtype, id=f"{name}-{label}-{dtype}", marks=marks)
                    )
    return params


over_backends = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=[pytest.mark.gpu] if name == "triton" else []) for name in _here()],
)


@pytest.mark.parametrize(("backend", "case", "dtype"), _params())
def test_attention_is_as_precise_as_torch_and_appends(
    backend: str, case: AttentionCase, dtype: torch.dtype
) -> None:
    attend, _, device = _attend(backend)
    assert_attends(attend, case, dtype, device)


@over_backends
@pytest.mark.parametrize("visible", [NAN, INF, -INF])
@pytest.mark.parametrize("entry", [0, 140])
def test_nan_and_infinity_in_one_sequence_stay_visible_there_and_only_there(
    backend: str, visible: float, entry: int
) -> None:
    attend, _, device = _attend(backend)
    tensors, options = given(_wide(5, 6), torch.float32, device)
    tensors[0][1, entry] = visible
    exact, _, _ = attended(*tensors, **options)
    result = attend(*tensors, **options)
    assert result[0].isfinite().all()
    assert not result[1].isfinite().all()
    assert torch.equal(result.isnan(), exact.isnan())


@over_backends
def test_attention_gives_the_same_bits_twice(backend: str) -> None:
    attend, _, device = _attend(backend)
    results = []
    for _ in range(2):
        tensors, options = given(CASES["window over wide heads"], torch.float16, device)
        results.append(attend(*tensors, **options))
    assert torch.equal(*results)


def test_every_backend_attends_in_every_dtype_that_it_has() -> None:
    met = {(param.values[0], param.values[2]) for param in _params()}
    assert met == {(name, dtype) for name in _here() for dtype in DTYPES[name]}
