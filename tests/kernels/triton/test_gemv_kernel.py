"""Run on a GPU where there is one, else in Triton's interpreter, in a process of its own."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels.reference import matmul as reference
from tests.helpers import assert_as_precise_as_torch, relative_error
from tests.kernels.cases import (
    EDGES,
    THRESHOLDS,
    VECTORS,
    assert_right_in_the_interpreter,
    draw,
    exact,
)

pytest.importorskip("triton")

from teal.kernels.operands import Operands
from teal.kernels.triton.gemv import launch
from teal.kernels.triton.tile_config import TileConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts float32 to bfloat16 where the hardware rounds.
DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])
INF, NAN = math.inf, math.nan

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the tests of this file itself")
@pytest.mark.slow
def test_kernels_are_right_in_the_interpreter() -> None:
    assert_right_in_the_interpreter(__file__)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_kept_channels_equal_those_of_the_reference(
    dtype: torch.dtype, vectors: str, threshold: float
) -> None:
    x = torch.cat([torch.tensor(EDGES, device=DEVICE), _draw(55)]).to(dtype)
    x[20] = threshold
    score_scale = _draw(64, seed=1).abs() if "score_scale" in vectors else None
    shift = _draw(64, seed=2) if "shift" in vectors else None
    keep = reference.keep_mask(x, threshold, score_scale, shift)
    # A kept channel brings exactly its own activation to its own column.
    weight = torch.eye(64, dtype=dtype, device=DEVICE)
    centred = x if shift is None else (x.float() - shift).to(dtype)
    result = launch(
        Operands(
            x=x[None],
            weight=weight,
            thresholds=[threshold],
            output_sizes=[64],
            score_scale=None if score_scale is None else score_scale[None],
            shift=shift,
        ),
        TileConfig(block_n=64, block_k=32, warps=1, unroll=2),
    )
    # A sum that starts at +0 gives +0 for -0.
    expected = torch.where(keep, centred, 0) + 0.0
    torch.testing.assert_close(result[0], expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("edge", [INF, -INF, NAN])
def test_what_is_not_finite_is_kept_and_stays_visible(dtype: torch.dtype, edge: float) -> None:
    x = torch.zeros(1, 40, dtype=dtype, device=DEVICE)
    x[0, 7] = edge
    weight = torch.ones(40, 32, dtype=dtype, device=DEVICE)
    result = launch(Operands(x=x, weight=weight, thresholds=[1.0], output_sizes=[32]))
    expected = torch.full((1, 32), edge, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(result, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.gpu
@dtypes
@tiles
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("in_features, out_features", [(63, 129), (300, 64), (257, 96)])
def test_product_is_as_precise_as_torch(
    dtype: torch.dtype, config: TileConfig, rows: int, in_features: int, out_features: int
) -> None:
    x = _draw(rows, in_features, dtype=dtype)
    weight = _draw(in_features, out_features, dtype=dtype, seed=1)
    score_scale, shift = _draw(in_features, seed=3).abs(), 0.1 * _draw(in_features, seed=4)
    bias = _draw(out_features, dtype=dtype, seed=2)
    vectors = {"score_scale": score_scale, "shift": shift, "bias": bias}
    operands = Operands(
        x=x,
        weight=weight,
        thresholds=[0.4],
        output_sizes=[out_features],
        score_scale=score_scale[None],
        shift=shift,
        bias=bias,
    )
    by_torch = reference.sparse_gemv(x, weight, 0.4, **vectors)
    expected = exact(x, weight, 0.4, **vectors)
    assert_as_precise_as_torch(launch(operands, config), by_torch, expected)


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


@pytest.mark.gpu
@tiles
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("half", [64, 45])
def test_gate_and_up_are_multiplied_after_the_activation(
    config: TileConfig, activation: str, half: int
) -> None:
    x, weight, bias = _draw(2, 200), _draw(200, 2 * half, seed=1), _draw(2 * half, seed=2)
    operands = Operands(
        x=x,
        weight=weight,
        thresholds=[0.3, 0.9],
        output_sizes=[half, half],
        activation=activation,
        bias=bias,
    )
    both = reference.sparse_linear(x, weight, [0.3, 0.9], [half, half], bias=bias)
    expected = reference.gate_and_up(both, activation)
    assert relative_error(launch(operands, config), expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
def test_norm_is_applied_before_the_mask(rows: int) -> None:
    x, weight, norm_weight = 3 * _draw(rows, 300), _draw(300, 64, seed=1), _draw(300, seed=2)
    operands = Operands(
        x=x, weight=weight, thresholds=[0.5], output_sizes=[64], norm_weight=norm_weight, eps=1e-5
    )
    normed = F.rms_norm(x, (300,), norm_weight, 1e-5)
    assert relative_error(launch(operands), reference.sparse_gemv(normed, weight, 0.5)) < 1e-6


@pytest.mark.gpu
@tiles
def test_twice_the_same_gives_the_same_bits(config: TileConfig) -> None:
    x, weight = _draw(1, 500), _draw(500, 128, seed=1)
    operands = Operands(x=x, weight=weight, thresholds=[0.5], output_sizes=[128])
    first = launch(operands, config)
    assert all(torch.equal(first, launch(operands, config)) for _ in range(3))


@pytest.mark.gpu
@tiles
@pytest.mark.parametrize("threshold", [INF, -1.0], ids=["all dropped", "all kept"])
def test_all_or_nothing_may_be_dropped(config: TileConfig, threshold: float) -> None:
    x, weight, bias = _draw(1, 200), _draw(200, 64, seed=1), _draw(64, seed=2)
    operands = Operands(x=x, weight=weight, thresholds=[threshold], output_sizes=[64], bias=bias)
    expected = bias[None] if threshold == INF else x @ weight + bias
    assert relative_error(launch(operands, config), expected) < 1e-6
