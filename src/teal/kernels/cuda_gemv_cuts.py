"""How one product on its own is cut into blocks, chosen by its size and format."""

import functools
import math
from dataclasses import dataclass, replace

import torch

from teal.kernels.cuda_strips import WARP, Cut, bits_of

# Of an H200: a grid that fits into it at once leaves no multiprocessor waiting for the last blocks.
_MULTIPROCESSORS = 132
_CLUSTERS = (8, 4, 2, 1)
# A thread has so many channels of a chunk at most: they take registers.
_CHANNELS_PER_THREAD = 8
_FLOAT_BITS = 16
_SHARED_UNROLL = 4
# Of a block.
_MOST_THREADS = 1024
# What every GPU that the kernels know lets a block have.
_SHARED_BYTES = 96 * 1024


@dataclass(frozen=True, kw_only=True)
class Product:
    """What a cut depends on.

    Attributes:
        in_features: Channels.
        widths: Columns of each part; of gate and of up.
        dtype: Of weights or codes.
        is_gated: Gate and up share a block.
        group_size: Channels that share a scale; 0 where all of them do.
        group_bytes: Of scale and zero of one group and column.
    """

    in_features: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    is_gated: bool = False
    group_size: int = 0
    group_bytes: int = 0

    @property
    def outputs(self) -> tuple[int, ...]:
        """Columns of the result, in parts."""
        return self.widths[:1] if self.is_gated else self.widths

    @property
    def bits(self) -> int:
        """Of a weight or code."""
        return bits_of(self.dtype)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Warps of a block, strips under way per thread, and blocks per multiprocessor."""

    warps_n: int
    warps_k: int
    unroll: int
    blocks: int


# By bits of a weight, and whether it is gate and up; the fastest of a sweep on an H200.
_BLOCKS = {
    (16, False): _Block(warps_n=1, warps_k=8, unroll=8, blocks=2),
    (16, True): _Block(warps_n=2, warps_k=4, unroll=4, blocks=4),
    (8, False): _Block(warps_n=2, warps_k=4, unroll=2, blocks=2),
    (8, True): _Block(warps_n=4, warps_k=2, unroll=2, blocks=2),
    (4, False): _Block(warps_n=1, warps_k=8, unroll=2, blocks=2),
    (4, True): _Block(warps_n=4, warps_k=2, unroll=4, blocks=2),
}


@functools.cache
def cut_for(product: Product, *, clusters: bool) -> Cut:
    """Return how a product is cut.

    Args:
        product: Its size and format.
        clusters: Whether the device has clusters of blocks.
    """
    block = _BLOCKS[product.bits, product.is_gated]
    cut = Cut(
        chunk=WARP,
        warps_n=block.warps_n,
        warps_k=block.warps_k,
        unroll=block.unroll,
        blocks=block.blocks if clusters else 1,
        cluster=_CLUSTERS[0] if clusters else 1,
    )
    fitting = [
        size
        for size in _CLUSTERS
        if size <= cut.cluster and tiles(product, cut) * size <= _MULTIPROCESSORS * cut.blocks
    ]
    cut = replace(cut, cluster=max(fitting, default=1))
    if product.bits == _FLOAT_BITS and tiles(product, cut) * cut.cluster > _MULTIPROCESSORS:
        # Blocks that share a multiprocessor have enough strips under way together.
        cut = replace(cut, unroll=min(cut.unroll, _SHARED_UNROLL))
    return chunked(product, cut)


def tiles(product: Product, cut: Cut) -> int:
    """Return how many blocks lie beside each other."""
    return sum(math.ceil(width / tile_columns(product, cut)) for width in product.outputs)


def tile_columns(product: Product, cut: Cut) -> int:
    """Return how many columns of the result a block computes."""
    columns = cut.columns(product.dtype)
    return columns // 2 if product.is_gated else columns


def chunked(product: Product, cut: Cut) -> Cut:
    """Return `cut` with chunks that every block of a cluster has one of, and that fit into it."""
    longest = cut.threads * _CHANNELS_PER_THREAD
    passes = math.ceil(product.in_features / (longest * cut.cluster))
    while True:
        unit = _unit(product, cut)
        chunk = math.ceil(product.in_features / (cut.cluster * passes * unit)) * unit
        if cut.cluster > 1 and (cut.cluster - 1) * chunk >= product.in_features:
            cut = replace(cut, cluster=cut.cluster // 2)
        elif chunk > unit and shared_bytes(product, replace(cut, chunk=chunk)) > _SHARED_BYTES:
            passes += 1
        else:
            return _with_even_shares(product, replace(cut, chunk=chunk))


def shared_bytes(product: Product, cut: Cut) -> int:
    """Return about how much shared memory a block takes."""
    halves = 2 if product.is_gated else 1
    columns = halves * tile_columns(product, cut)
    groups = max(1, cut.chunk // product.group_size) if product.group_size else 1
    sums = 4 * columns * (3 * cut.warps_k // 2 + 1)
    return halves * 9 * cut.chunk + columns * groups * product.group_bytes + sums


def _unit(product: Product, cut: Cut) -> int:
    """Return what a chunk is a multiple of."""
    # Groups are scaled whole; where all channels are one, warps share a chunk evenly.
    return product.group_size or WARP * (cut.warps_k if product.bits == 4 else 1)


def _with_even_shares(product: Product, cut: Cut) -> Cut:
    """Choose as many warps as can share the groups of a chunk evenly."""
    if not product.group_size:
        return cut

    def waste(warps: int) -> float:
        share, is_whole = cut.chunk // warps, cut.chunk % (warps * WARP) == 0
        segment = share if is_whole and product.group_size % share == 0 else product.group_size
        return math.ceil(cut.chunk / segment / warps) * segment * warps / cut.chunk

    # A thread finishes one column at most.
    least = math.ceil(tile_columns(product, cut) / (cut.cluster * WARP * cut.warps_n))
    most = min(3 * cut.warps_k // 2, _MOST_THREADS // (WARP * cut.warps_n))
    around = range(max(least, cut.warps_k // 2), most + 1)
    warps = min(around, key=lambda number: (waste(number), abs(number - cut.warps_k)))
    # As many registers for a thread as before.
    blocks = max(1, cut.blocks * cut.warps_k // warps)
    return replace(cut, warps_k=warps, blocks=blocks)
