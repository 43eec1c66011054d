import pytest
import torch

from tests.kernels.cases import AttentionCase

pytest.importorskip("triton")

from teal.kernels.triton.attention import TritonAttention, splits_for


def _case(*positions: int, **changes: object) -> AttentionCase:
    sizes = {"head_dim": 32, "rotary_dim": 32, "capacity": max(positions) + 3}
    return AttentionCase(positions=positions, **{**sizes, **changes})


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
