"""Launches the Triton kernel: tile, workspace and arguments of one product on the GPU."""

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.operands import Operands
from teal.kernels.triton.gemv_kernel import sparse_gemv_kernel
from teal.kernels.triton.tile_config import Tile, tile_for

MAX_ROWS = 2
MAX_PARTS = 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_WARP = 32
_LOAD_BYTES = 16
_STREAMS = 64
_TILES = 1 << 14


def launch(operands: Operands, tile: Tile | None = None) -> Tensor:
    """Compute one product on the GPU, in one launch.

    Sums are in float32 and in one fixed order, so the same input gives the same bits. The last
    program of a column tile to arrive adds the partial sums of all of them.

    Args:
        operands: On one CUDA device and contiguous, `x` of 1 to `MAX_ROWS` rows, (T, K), for 1 to
            `MAX_PARTS` parts.
        tile: How to cut the product; by default what the table has for its shape.

    Returns:
        (T, N), or (T, N / 2) with an activation, in the dtype of `x`.
    """
    x, weight = operands.x, operands.weight
    rows, in_features = x.shape
    columns = weight.shape[1]
    tile = tile or tile_for(_form(operands), in_features, columns)
    gated = operands.activation is not None
    parts = operands.widths[:1] if gated else operands.widths
    result = x.new_empty((rows, sum(parts)))
    tiles = sum(math.ceil(width / tile.block_n) for width in parts)
    chunks = math.ceil(in_features / tile.block_k)
    lists, partials, arrived = _workspace(x, tile, rows, tiles * chunks, 2 if gated else 1)
    starts = [*_starts(operands.widths)[1:], columns, columns][:2]
    thresholds = [*operands.thresholds, 0.0, 0.0][:MAX_PARTS]
    absent = result
    sparse_gemv_kernel[(tiles, chunks)](
        x,
        weight,
        result,
        *(
            absent if vector is None else vector
            for vector in (
                operands.gain,
                operands.scale,
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
        operands.epsilon,
        in_features,
        columns,
        PARTS=len(parts),
        ACTIVATION=operands.activation,
        HAS_NORM=operands.gain is not None,
        HAS_SCALE=operands.scale is not None,
        HAS_SHIFT=operands.shift is not None,
        HAS_BIAS=operands.bias is not None,
        HAS_RESIDUAL=operands.residual is not None,
        ROWS=rows,
        BLOCK_N=tile.block_n,
        GROUPS=groups(tile, x.element_size()),
        BLOCK_K=tile.block_k,
        UNROLL=max(1, tile.unroll // rows),
        CHUNKS=triton.next_power_of_2(chunks),
        EVEN=all(width % tile.block_n == 0 for width in parts),
        num_warps=tile.warps,
        num_stages=1,
    )
    return result


def groups(tile: Tile, element_size: int) -> int:
    """Return how many strips a program loads at once, each thread 16 bytes of one."""
    return max(1, _WARP * tile.warps * _LOAD_BYTES // element_size // tile.block_n)


def _form(operands: Operands) -> str:
    """Return the name of the fused form, as in the table of tiles."""
    if operands.activation is not None:
        return "gated"
    return "plain" if len(operands.widths) == 1 else "parts"


def _starts(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:part]) for part in range(len(widths))]


def _workspace(
    x: Tensor, tile: Tile, rows: int, programs: int, lists: int
) -> tuple[Tensor, Tensor, Tensor]:
    list_size = programs * lists * tile.block_k
    partial_size = programs * lists * rows * tile.block_n
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
