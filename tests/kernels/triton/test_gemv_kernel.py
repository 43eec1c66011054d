"""Run on a GPU where there is one, else in Triton's interpreter by ../test_products.py."""

import os

import pytest
import torch
from torch import Tensor

from teal.kernels.reference import matmul as reference
from tests.helpers import relative_error
from tests.kernels.cases import draw

pytest.importorskip("triton")

from teal.kernels.operands import Operands
from teal.kernels.triton.gemv import launch
from teal.kernels.triton.tile_config import TileConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
tiles = pytest.mark.parametrize(
    "config",
    [
        TileConfig(block_n=32, block_k=64, warps=1, unroll=2),
        TileConfig(block_n=64, block_k=1024, warps=2, unroll=8),
        TileConfig(block_n=128, block_k=128, warps=4, unroll=4),
    ],
    ids=["small", "one chunk", "wide"],
)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.mark.gpu
@tiles
@pytest.mark.parametrize("output_sizes", [(64, 32, 32), (33, 14, 17), (96, 33)], ids=str)
def test_each_part_has_its_own_threshold_and_the_residual_is_added(
    config: TileConfig, output_sizes: tuple[int, ...]
) -> None:
    x, weight = _draw(1, 200), _draw(200, sum(output_sizes), seed=1)
    residual = _draw(1, sum(output_sizes), seed=2)
    thresholds = [0.3, 0.9, 1.5][: len(output_sizes)]
    score_scale = _draw(len(output_sizes), 200, seed=3).abs()
    operands = Operands(
        x=x,
        weight=weight,
        thresholds=thresholds,
        output_sizes=output_sizes,
        score_scale=score_scale,
        residual=residual,
    )
    expected = residual + reference.sparse_linear(x, weight, thresholds, output_sizes, score_scale)
    assert relative_error(launch(operands, config), expected) < 1e-6
