"""How the CUDA kernels config a product into blocks, and what they are told of its weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.kernels.cuda.nvrtc import Definitions
from teal.kernels.operands import QuantParams
from teal.kernels.reference.quantized import FP8, INT4, INT8

# Of activations.
DTYPES = (torch.bfloat16, torch.float16)
FRACTION_BITS = 40

WARP = 32
# Of addresses, in bytes.
_ALIGNMENT = 16
# Most columns of a thread.
_COLUMNS_OF_FLOATS = 8
_COLUMNS_OF_CODES = 16
# Numbers in weight_rows.cuh, and bits of a weight.
_FORMATS = {
    torch.bfloat16: (0, 16),
    torch.float16: (0, 16),
    INT8: (1, 8),
    FP8: (2, 8),
    INT4: (3, 4),
}
_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a product is config into blocks.

    Attributes:
        chunk: Channels that a block lists at a time, a multiple of 32; of int4 a multiple of the
            channels that share a scale, or a part of them.
        per_lane: Columns of a thread: 4 or 8 of floats, 8 or 16 of 8 bits, 8 to 32 of 4 bits; of
            several rows those of a warp divided by its threads, 2 to 8.
        warps_n: Warps beside each other.
        warps_k: Warps that share the channels.
        unroll: Strips that a thread asks for at a time, of codes an even number; of several rows
            channels that a group of threads does, a multiple of 16.
        blocks: Blocks that fit into one multiprocessor, for the compiler.
        cluster: Blocks that work together.
        depth: 2 where a thread asks for weight rows while it adds the ones before, else 1.
        early: Channels of a warp whose weight rows, if kept, are asked for while the block makes
            its list; at most 32.
    """

    chunk: int
    per_lane: int = 8
    warps_n: int
    warps_k: int
    unroll: int
    blocks: int
    cluster: int = 1
    depth: int = 1
    early: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps_n * self.warps_k

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.per_lane * WARP * self.warps_n

    def segment(self, group_size: int) -> int:
        """Return how many channels of int4 a warp scales at once; see quant_scales.cuh."""
        share, is_whole = self.chunk // self.warps_k, self.chunk % (self.warps_k * WARP) == 0
        return share if is_whole and group_size % share == 0 else group_size

    def turns(self, group_size: int) -> int:
        """Return how often a warp does that."""
        return math.ceil(self.chunk / self.segment(group_size) / self.warps_k)

    def tiles(self, output_sizes: Sequence[int]) -> int:
        """Blocks beside each other for parts of some output_sizes."""
        return sum(math.ceil(width / self.columns) for width in output_sizes)


def bits_of(dtype: torch.dtype) -> int:
    """Return the bits of a weight, or code, of `dtype`."""
    return _FORMATS[dtype][1]


def can_load(
    weight: Tensor, quant: QuantParams | None, output_sizes: Sequence[int], activations: torch.dtype
) -> bool:
    """Tell whether the kernels know the format of a weight and vector loads divide its rows.

    Args:
        weight: Floats or codes.
        quant: What the codes stand for.
        output_sizes: Columns of each part.
        activations: Their dtype.
    """
    if weight.dtype not in _FORMATS or activations not in DTYPES:
        return False
    if quant is None and weight.dtype != activations:
        return False
    if quant is not None and not _has_known_scales(weight, quant):
        return False
    if not all(map(_is_aligned, (weight, *(quant or ())[:2]))):
        return False
    columns = _COLUMNS_OF_FLOATS if quant is None else _COLUMNS_OF_CODES
    return all(width % columns == 0 for width in output_sizes)


def weight_definitions(
    weight: Tensor,
    quant: QuantParams | None,
    columns: int,
    activations: torch.dtype,
    config: TileConfig,
    rows: int = 1,
) -> Definitions:
    """Return what accumulate.cuh is compiled with, and the size of blocks and clusters.

    Args:
        weight: Floats or codes, a strip per input channel.
        quant: What the codes stand for.
        columns: Of the weight as floats.
        activations: Their dtype.
        config: How the product is config.
        rows: Of activations, multiplied at once.
    """
    in_features = weight.shape[0]
    definitions = {
        "BFLOAT16": int(activations == torch.bfloat16),
        "FRACTION_BITS": FRACTION_BITS,
        "K": in_features,
        "N": columns,
        "FORMAT": _FORMATS[weight.dtype][0],
        "CHUNK": config.chunk,
        "PER_LANE": config.per_lane,
        "WARPS_N": config.warps_n,
        "WARPS_K": config.warps_k,
        "UNROLL": config.unroll,
        "BLOCKS": config.blocks,
        "CLUSTER": config.cluster,
        "DEPTH": config.depth,
        "EARLY": config.early,
        "ROWS": rows,
    }
    if quant is not None:
        has_one_group = quant.scales.shape[0] == 1
        definitions |= {
            "GROUP": _next_multiple(in_features, config.chunk)
            if has_one_group
            else quant.group_size,
            "SCALES": _SCALES[quant.scales.dtype],
            "HAS_ZEROS": int(quant.zeros is not None),
        }
    return tuple(sorted(definitions.items()))


def _has_known_scales(codes: Tensor, quant: QuantParams) -> bool:
    """Tell whether there is a scale per output, or int4 in groups of whole words of the list."""
    is_whole = codes.dtype == INT4 and quant.group_size % WARP == 0
    return quant.scales.dtype in _SCALES and (len(quant.scales) == 1 or is_whole)


def _is_aligned(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0)


def _next_multiple(size: int, of: int) -> int:
    return math.ceil(size / of) * of
