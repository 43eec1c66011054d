"""Run on a GPU where there is one, else in Triton's interpreter by ../test_products.py."""

import os

import pytest
import torch

from tests.helpers import relative_error
from tests.kernels.attention_cases import given
from tests.kernels.cases import AttentionCase, attended

pytest.importorskip("triton")

from teal.kernels.triton.attention import attend, attend_parts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAN = float("nan")


def _case(*positions: int, **changes: object) -> AttentionCase:
    sizes = {"head_dim": 32, "rotary_dim": 32, "capacity": max(positions) + 3}
    return AttentionCase(positions=positions, **{**sizes, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("position", [62, 63, 64, 65, 511, 512, 513])
def test_every_length_around_the_borders_of_splits_is_right(position: int) -> None:
    tensors, options = given(_case(position, heads=2, kv_heads=1), torch.float32, DEVICE)
    exact, _, _ = attended(*tensors, **options)
    assert relative_error(attend(*tensors, **options), exact) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [8, 16, 32])
def test_any_number_of_splits_gives_the_same_attention(splits: int) -> None:
    tensors, options = given(_case(200), torch.float32, DEVICE)
    parts = torch.full((1, 4, splits, 34), NAN, device=DEVICE)
    attend_parts(*tensors, parts, **options)
    factor = torch.exp(parts[..., 32:33] - parts[..., 32:33].amax(2, keepdim=True))
    result = (factor * parts[..., :32]).sum(2) / (factor * parts[..., 33:]).sum(2)
    exact, _, _ = attended(*tensors, **options)
    assert relative_error(result.view(1, -1), exact) < 1e-6
