"""Finds the fastest tile configuration of the Triton kernel for a shape."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from teal.benchmark.gemv import Product
from teal.benchmark.model_configs import Shape
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.kernels.triton.tile_config import TileConfig, TunedConfig

try:
    from teal.kernels.triton import gemv as triton_gemv
except ImportError:
    triton_gemv = None  # type: ignore[assignment]

# Shapes are tuned at this sparsity: the ranking hardly changes between 40 % and 65 %.
SPARSITY = 0.5

_BLOCKS_N = (64, 128, 256, 512)
_WARPS = (1, 2, 4)
_UNROLLS = (4, 8, 16)
# Channels that each warp scans: fewer leave nothing to overlap, more delay the first load.
_CHANNELS_PER_WARP = (128, 256)
# Gate and up double the weight rows in flight, and the registers for them.
_MOST_WEIGHT_ROWS = 16
_LEAST_PROGRAMS = 200
_MOST_PROGRAMS = 2800


def candidates(shape: Shape) -> Iterator[TileConfig]:
    """Yield the configurations worth measuring for `shape`."""
    gated = shape.form == "gated"
    columns = shape.output_sizes[0] if gated else shape.out_features
    for block_n, warps, unroll in itertools.product(_BLOCKS_N, _WARPS, _UNROLLS):
        for channels in _CHANNELS_PER_WARP:
            block_k = warps * channels
            programs = math.ceil(columns / block_n) * math.ceil(shape.in_features / block_k)
            fits = _LEAST_PROGRAMS <= programs <= _MOST_PROGRAMS
            if fits and unroll * (1 + gated) <= _MOST_WEIGHT_ROWS:
                yield TileConfig(block_n=block_n, block_k=block_k, warps=warps, unroll=unroll)


def tune(product: Product, progress: Progress = silent) -> TunedConfig:
    """Time every candidate on one row at 50 % sparsity and return the fastest.

    Args:
        product: Shape and inputs, on a GPU.
        progress: Shows progress over the candidates.

    Raises:
        UserError: There is no GPU or no Triton, or the weights are quantized.
    """
    if product.format is not None:
        raise UserError(
            "Quantized products are tuned on a GPU with the CUDA kernel. Run --tune there."
        )
    if triton_gemv is None or not product.x.is_cuda:
        raise UserError("Products are tuned on a GPU with Triton. Run --tune there.")
    shape, threshold = product.shape, product.threshold(SPARSITY)
    product.check(threshold)
    times = {
        config: _time(product, config, threshold)
        for config in progress(list(candidates(shape)), f"Configurations for {shape.name}")
    }
    return TunedConfig(
        form=shape.form,
        in_features=shape.in_features,
        out_features=shape.out_features,
        config=min(times, key=lambda config: times[config]),
    )


def _time(product: Product, config: TileConfig, threshold: float) -> float:
    def call(i: int) -> Tensor:
        operands, _ = product.operands(i % product.copies, threshold)
        return triton_gemv.launch(operands, config)

    median = product.time(call).median
    torch.cuda.empty_cache()
    return median
