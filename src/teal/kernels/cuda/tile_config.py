"""How the CUDA kernels divide a product into blocks, and which weights they can load."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.kernels.cuda.kernel_config import Dtype, Format, ProductConfig
from teal.kernels.operands import QuantParams, part_starts
from teal.kernels.reference.quantized import FP8, INT4, INT8

# Dtypes of activations.
DTYPES = (torch.bfloat16, torch.float16)

WARP = 32
# Of addresses, in bytes.
_ALIGNMENT = 16
# The columns of a part are a multiple of this: the most that a thread has.
_COLUMNS_OF_FLOATS = 8
_COLUMNS_OF_CODES = 16
# Format, and bits per weight.
_FORMATS = {
    torch.bfloat16: (Format.FLOAT, 16),
    torch.float16: (Format.FLOAT, 16),
    INT8: (Format.INT8, 8),
    FP8: (Format.FP8, 8),
    INT4: (Format.INT4, 4),
}
_SCALE_DTYPES = tuple(dtype.value for dtype in Dtype)


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a product is divided into blocks.

    Attributes:
        chunk: Channels that a block compacts at a time, a multiple of 32; for int4 a multiple or a
            divisor of the channels that share a scale.
        per_lane: Columns of a thread: 4 or 8 of floats, 8 or 16 of 8-bit codes, 8 to 32 of 4-bit
            codes. With several rows, the columns of a warp divided by its threads, 2 to 8.
        warps_n: Warps side by side.
        warps_k: Warps that share the channels.
        unroll: Weight rows that a thread loads at a time; an even number for codes. With several
            rows, channels that four threads load at a time, a multiple of 16.
        blocks: Blocks per multiprocessor that the compiler makes room for.
        cluster: Blocks per cluster.
        depth: 2 to load weight rows while adding the previous ones, else 1.
        early: Channels of a warp whose weight rows, if kept, are prefetched during compaction; at
            most 32.
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

    def segments_per_warp(self, group_size: int) -> int:
        """Return how many segments of a chunk a warp scales."""
        return math.ceil(self.chunk / self.segment(group_size) / self.warps_k)

    def tiles(self, output_sizes: Sequence[int]) -> int:
        """Return the number of blocks side by side for parts of some sizes."""
        return sum(math.ceil(size / self.columns) for size in output_sizes)


def bits_of(dtype: torch.dtype) -> int:
    """Return the bits per weight, stored as `dtype`."""
    return _FORMATS[dtype][1]


def can_load(
    weight: Tensor, quant: QuantParams | None, output_sizes: Sequence[int], activations: torch.dtype
) -> bool:
    """Tell whether the kernels know the format of a weight and can load its rows in vectors.

    Args:
        weight: Floats or codes.
        quant: What decodes the weight; `None` for floats.
        output_sizes: Columns of each part.
        activations: Dtype of the activations.
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
    return all(size % columns == 0 for size in output_sizes)


def product_config(
    weight: Tensor,
    quant: QuantParams | None,
    output_sizes: Sequence[int],
    activations: torch.dtype,
    config: TileConfig,
    rows: int = 1,
) -> ProductConfig:
    """Return what the kernels of a product are compiled for.

    Args:
        weight: Floats or codes, one row per input channel; only shape and dtype are read.
        quant: What decodes the weight; `None` for floats.
        output_sizes: Columns of each part.
        activations: Dtype of the activations.
        config: How the product is divided into blocks.
        rows: Rows of activations that are multiplied at once.
    """
    start_1, start_2 = part_starts(output_sizes)
    return ProductConfig(
        dtype=Dtype(activations),
        in_features=len(weight),
        out_features=sum(output_sizes),
        rows=rows,
        format=_FORMATS[weight.dtype][0],
        group_size=0 if quant is None else _group_size(len(weight), quant, config),
        scale_dtype=Dtype.FLOAT32 if quant is None else Dtype(quant.scales.dtype),
        has_zeros=quant is not None and quant.zeros is not None,
        start_1=start_1,
        start_2=start_2,
        chunk=config.chunk,
        per_lane=config.per_lane,
        warps_n=config.warps_n,
        warps_k=config.warps_k,
        unroll=config.unroll,
        blocks=config.blocks,
        cluster=config.cluster,
        depth=config.depth,
        early=config.early,
    )


def _group_size(in_features: int, quant: QuantParams, config: TileConfig) -> int:
    """Return the channels that share a scale; a single group is extended to whole chunks."""
    has_one_group = len(quant.scales) == 1
    return (
        math.ceil(in_features / config.chunk) * config.chunk if has_one_group else quant.group_size
    )


def _has_known_scales(codes: Tensor, quant: QuantParams) -> bool:
    """Tell whether there is one scale per column, or int4 in groups of whole words of channels."""
    is_whole = codes.dtype == INT4 and quant.group_size % WARP == 0
    return quant.scales.dtype in _SCALE_DTYPES and (len(quant.scales) == 1 or is_whole)


def _is_aligned(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0)
