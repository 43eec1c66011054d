from typing import Any

import pytest
import torch
from torch import Tensor

from teal.engine.prefill_attention import attend_many
from teal.kernels.reference.attention import attend
from tests.helpers import TOLERANCES

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 2, 8, 20
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "window_of_one": {"window": 1},
    "wide_window": {"window": 50},
    "softcap": {"softcap": 0.5},
    "softcap_and_window": {"softcap": 0.5, "window": 3},
    "norms": {
        "q_norm_weight": torch.linspace(0.5, 2, 8),
        "k_norm_weight": torch.linspace(2, 0.5, 8),
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(rotary_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(CAPACITY)[:, None] * 0.7 ** torch.arange(rotary_dim // 2)
    return angles.cos(), angles.sin()


def caches() -> tuple[Tensor, Tensor]:
    """Return an unwritten cache, full of NaN."""
    empty = torch.full((2, KV_HEADS, CAPACITY, HEAD_DIM), torch.nan)
    return empty[0], empty[1]


def at_once(qkv: Tensor, cache: tuple[Tensor, Tensor], start: int, **options: Any) -> Tensor:
    keys, values = cache
    end = start + len(qkv)
    positions = torch.arange(start, end)
    return attend_many(qkv, keys[:, :end], values[:, :end], positions, *tables(HEAD_DIM), **options)


def one_by_one(qkv: Tensor, cache: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    keys, values = (tensor[None] for tensor in cache)
    return torch.cat(
        [
            attend(row[None], keys, values, torch.tensor([i]), *tables(HEAD_DIM), **options)
            for i, row in enumerate(qkv)
        ]
    )


@every_option
@pytest.mark.parametrize("split", [0, 1, 4, 11])
def test_many_tokens_at_once_equal_one_by_one(options: dict[str, Any], split: int) -> None:
    qkv = draw(12, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    options = {"scale": 0.4, "eps": 1e-5, **options}
    many, single = caches(), caches()
    parts = [at_once(part, many, start, **options) for start, part in split_at(qkv, split)]
    expected = one_by_one(qkv, single, **options)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=TOLERANCES["logits"])
    for written, reference in zip(many, single, strict=True):
        torch.testing.assert_close(
            written, reference, rtol=0, atol=TOLERANCES["logits"], equal_nan=True
        )


def split_at(qkv: Tensor, split: int) -> list[tuple[int, Tensor]]:
    return [(start, part) for start, part in ((0, qkv[:split]), (split, qkv[split:])) if len(part)]


def test_channels_behind_the_rotary_ones_are_unchanged() -> None:
    qkv = draw(5, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    keys, values = (cache[:, :5] for cache in caches())
    attend_many(qkv, keys, values, torch.arange(5), *tables(4), scale=1.0)
    given = qkv.view(5, -1, HEAD_DIM)[:, HEADS : HEADS + KV_HEADS].transpose(0, 1)
    assert torch.equal(keys[..., 4:], given[..., 4:])
    assert not torch.isclose(keys[:, 1:, :4], given[:, 1:, :4]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    qkv = draw(3, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
    keys, values = (cache[:, :3].to(dtype) for cache in caches())
    attended = attend_many(qkv, keys, values, torch.arange(3), *tables(HEAD_DIM), scale=1.0)
    assert attended.dtype == dtype
    assert attended.shape == (3, HEADS * HEAD_DIM)
