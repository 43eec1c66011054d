"""Launches the Triton kernel: config, workspace and arguments of one product on the GPU."""

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.operands import Operands
from teal.kernels.triton.gemv_kernel import sparse_gemv_kernel
from teal.kernels.triton.tile_config import TileConfig, config_for

MAX_ROWS = 2
MAX_PARTS = 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_WARP = 32
_LOAD_BYTES = 16
_STREAMS = 64
_TILES = 1 << 14


def launch(operands: Operands, config: TileConfig | None = None) -> Tensor:
    """Compute one product on the GPU, in one launch.

    Sums are in float32 and in one fixed order, so the same input gives the same bits. The last
    program of a column config to arrive adds the partial sums of all of them.

    Args:
        operands: On one CUDA device and contiguous, `x` of 1 to `MAX_ROWS` rows, (T, K), for 1 to
            `MAX_PARTS` parts.
        config: How to cut the product; by default what the table has for its shape.

    Returns:
        (T, N), or (T, N / 2) with an activation, in the dtype of `x`.
    """
    x, weight = operands.x, operands.weight
    rows, in_features = x.shape
    columns = weight.shape[1]
    config = config or config_for(_form(operands), in_features, columns)
    gated = operands.activation is not None
    parts = operands.output_sizes[:1] if gated else operands.output_sizes
    result = x.new_empty((rows, sum(parts)))
    tiles = sum(math.ceil(width / config.block_n) for width in parts)
    chunks = math.ceil(in_features / config.block_k)
    lists, partials, arrived = _workspace(x, config, rows, tiles * chunks, 2 if gated else 1)
    starts = [*_starts(operands.output_sizes)[1:], columns, columns][:2]
    thresholds = [*operands.thresholds, 0.0, 0.0][:MAX_PARTS]
    absent = result
    sparse_gemv_kernel[(tiles, chunks)](
        x,
        weight,
        result,
        *(
            absent if vector is None else vector
            for vector in (
                operands.norm_weight,
                operands.score_scale,
                operands.shift,
                operands.bias,
                operands.residual,
            )
        ),
        lists,
        partials,
        arrived,
        *thresholds,
        *starts,
        operands.eps,
        in_features,
        columns,
        PARTS=len(parts),
        ACTIVATION=operands.activation,
        HAS_NORM=operands.norm_weight is not None,
        HAS_SCALE=operands.score_scale is not None,
        HAS_SHIFT=operands.shift is not None,
        HAS_BIAS=operands.bias is not None,
        HAS_RESIDUAL=operands.residual is not None,
        ROWS=rows,
        BLOCK_N=config.block_n,
        GROUPS=groups(config, x.element_size()),
        BLOCK_K=config.block_k,
        UNROLL=max(1, config.unroll // rows),
        CHUNKS=triton.next_power_of_2(chunks),
        EVEN=all(width % config.block_n == 0 for width in parts),
        num_warps=config.warps,
        num_stages=1,
    )
    return result


def groups(config: TileConfig, element_size: int) -> int:
    """Return how many weight rows a program loads at once, each thread 16 bytes of one."""
    return max(1, _WARP * config.warps * _LOAD_BYTES // element_size // config.block_n)


def _form(operands: Operands) -> str:
    """Return the name of the fused form, as in the table of tiles."""
    if operands.activation is not None:
        return "gated"
    return "plain" if len(operands.output_sizes) == 1 else "parts"


def _starts(output_sizes: Sequence[int]) -> list[int]:
    return [sum(output_sizes[:part]) for part in range(len(output_sizes))]


def _workspace(
    x: Tensor, config: TileConfig, rows: int, programs: int, lists: int
) -> tuple[Tensor, Tensor, Tensor]:
    list_size = programs * lists * config.block_k
    partial_size = programs * lists * rows * config.block_n
    memory = torch.empty(list_size + partial_size, dtype=torch.int32, device=x.device)
    partials = memory[list_size:].view(torch.float32)
    return memory[:list_size], partials, _arrived(x.device)


def _arrived(device: torch.device) -> Tensor:
    """Return the counters of the current stream; every launch leaves them at zero."""
    if device.type != "cuda":
        # The interpreter runs one program after the other.
        return torch.zeros(_TILES, dtype=torch.int32)
    slots = _slots(device.index)
    slot = slots.setdefault(torch.cuda.current_stream(device).cuda_stream, len(slots))
    if slot >= _STREAMS:
        raise UserError(
            f"Sparse products ran on more than {_STREAMS} streams of one device. Use fewer."
        )
    return _counters(device.index)[slot]


@functools.cache
def _slots(device: int) -> dict[int, int]:
    del device
    return {}


@functools.cache
def _counters(device: int) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            "The first sparse product on a device cannot be captured in a CUDA graph. "
            "Run it once before capturing."
        )
    return torch.zeros(_STREAMS, _TILES, dtype=torch.int32, device=f"cuda:{device}")
