"""Launches the Triton kernel of one product: tile configuration, workspace and arguments."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.operands import MAX_PARTS, Operands, QuantParams, padded_thresholds, part_starts
from teal.kernels.reference.matmul import keeps_everything
from teal.kernels.triton.gemv_kernel import sparse_gemv_kernel
from teal.kernels.triton.tile_config import TileConfig, config_for
from teal.kernels.tuning import device_name

MAX_ROWS = 2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_WARP = 32
_LOAD_BYTES = 16
_STREAMS = 64
_TILES = 1 << 14


class TritonBackend:
    """Computes products with float weights on GPUs of any maker that Triton compiles for."""

    name = "triton"

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str | None:
        """Say why the kernel cannot compute a product, or torch's is faster; `None` if it can."""
        if quant is not None:
            return "it has no kernel for quantized weights"
        if keeps_everything(operands.thresholds):
            return "nothing is dropped, and torch's dense product is faster"
        if not 1 <= operands.rows <= MAX_ROWS:
            return "x does not have one or two rows"
        if len(operands.output_sizes) > MAX_PARTS:
            return "there are more than three parts"
        if operands.x.dtype not in DTYPES:
            return "x is not bfloat16, float16 or float32"
        return None

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        """Compute a product on the device of its operands; see `launch`."""
        del quant
        x = operands.x
        contiguous: Iterator[Any] = (
            operand.contiguous() if isinstance(operand, Tensor) else operand
            for operand in operands._replace(x=x.reshape(-1, x.shape[-1]))
        )
        with torch.cuda.device(x.device):
            result = launch(Operands(*contiguous))
        return result.view(*x.shape[:-1], result.shape[-1])


def launch(operands: Operands, config: TileConfig | None = None) -> Tensor:
    """Compute one product on the GPU, in one launch.

    Sums are in float32 and in one fixed order, so the same input gives the same bits. The last
    program of a column tile to arrive adds the partial sums of all of them.

    Args:
        operands: Operands on one device, all contiguous, with `x` (T, K) of 1 to `MAX_ROWS` rows.
        config: How the product is split into programs; by default as the tuning table has it for
            the nearest shape.

    Returns:
        (T, N), or (T, N / 2) with an activation, in the dtype of `x`.
    """
    x, weight = operands.x, operands.weight
    rows, in_features = x.shape
    columns = weight.shape[1]
    if config is None:
        device = device_name(x.device)
        config = config_for(_form(operands), in_features, columns, operands.tuning, device)
    gated = operands.activation is not None
    parts = operands.output_sizes[:1] if gated else operands.output_sizes
    result = x.new_empty((rows, sum(parts)))
    tiles = sum(math.ceil(width / config.block_n) for width in parts)
    chunks = math.ceil(in_features / config.block_k)
    kept, partials, arrived = _workspace(x, config, rows, tiles * chunks, 2 if gated else 1)
    sparse_gemv_kernel[(tiles, chunks)](
        x,
        weight,
        result,
        *(result if vector is None else vector for vector in _vectors(operands)),
        kept,
        partials,
        arrived,
        *padded_thresholds(operands.thresholds),
        *part_starts(operands.output_sizes),
        operands.eps,
        in_features,
        columns,
        PARTS=len(parts),
        ACTIVATION=operands.activation,
        HAS_NORM=operands.norm_weight is not None,
        HAS_SCORE_SCALE=operands.score_scale is not None,
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
    """Return how many weight rows a program loads at once, where a thread loads 16 bytes of one.

    Args:
        config: The tile configuration.
        element_size: Bytes of a weight.
    """
    return max(1, _WARP * config.warps * _LOAD_BYTES // element_size // config.block_n)


def _vectors(operands: Operands) -> tuple[Tensor | None, ...]:
    """Return the optional operands in the order of the kernel's parameters."""
    o = operands
    return o.norm_weight, o.score_scale, o.shift, o.bias, o.residual


def _form(operands: Operands) -> str:
    """Return the name of the fused form in the tuning table."""
    if operands.activation is not None:
        return "gated"
    return "plain" if len(operands.output_sizes) == 1 else "parts"


def _workspace(
    x: Tensor, config: TileConfig, rows: int, programs: int, halves: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the kept channels of each program, its partial sums, and the counters."""
    kept_size = programs * halves * config.block_k
    partial_size = programs * halves * rows * config.block_n
    memory = torch.empty(kept_size + partial_size, dtype=torch.int32, device=x.device)
    partials = memory[kept_size:].view(torch.float32)
    return memory[:kept_size], partials, _arrived(x.device)


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
