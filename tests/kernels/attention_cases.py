"""What attention of every backend has to give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers import assert_as_precise_as_torch, relative_error
from tests.kernels.cases import AttentionCase, attended

Attend = Callable[..., Tensor]


def given(
    case: AttentionCase, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the tensors and the options of a call on a device."""
    options = case.arguments(dtype)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return [tensor.to(device) for tensor in case.tensors(dtype)], moved


def assert_attends(
    attend: Attend, case: AttentionCase, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Require attention as precise as torch's, and new tokens in the cache and nothing else."""
    tensors, options = given(case, dtype, device)
    exact, keys, values = attended(*tensors, **options)
    by_torch, _, _ = attended(*tensors, **options, dtype=dtype)
    before = [cache.clone() for cache in tensors[1:3]]
    assert_as_precise_as_torch(attend(*tensors, **options), by_torch, exact)
    for cache, old, new in zip(tensors[1:3], before, (keys, values), strict=True):
        for row, position in enumerate(case.positions):
            assert relative_error(cache[row, :, position], new[row]) <= torch.finfo(dtype).eps
            old[row, :, position] = cache[row, :, position]
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
