import pytest
import torch

from teal.kernels.reference.attention import attend
from tests.helpers import assert_as_precise_as_torch, relative_error
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, attended

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
CASES = pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)


@CASES
@DTYPES
def test_attention_is_as_precise_as_that_of_torch(case: AttentionCase, dtype: torch.dtype) -> None:
    tensors, options = case.tensors(dtype), case.arguments(dtype)
    exact, _, _ = attended(*tensors, **options)
    by_torch, _, _ = attended(*tensors, **options, dtype=dtype)
    assert_as_precise_as_torch(attend(*tensors, **options), by_torch, exact)


@CASES
@DTYPES
def test_only_the_entries_at_the_positions_change_in_the_cache(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    tensors, options = case.tensors(dtype), case.arguments(dtype)
    _, keys, values, positions = tensors[:4]
    _, new_keys, new_values = attended(*tensors, **options)
    before = [cache.clone() for cache in (keys, values)]
    attend(*tensors, **options)
    for row, position in enumerate(positions.tolist()):
        assert relative_error(keys[row, :, position], new_keys[row]) <= torch.finfo(dtype).eps
        assert torch.equal(values[row, :, position], new_values[row])
        for cache, old in zip((keys, values), before, strict=True):
            old[row, :, position] = cache[row, :, position]
    for cache, old in zip((keys, values), before, strict=True):
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
