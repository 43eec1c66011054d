"""How a product on its own is divided into blocks, chosen by its size and format."""

import functools
import math
from dataclasses import dataclass, replace

import torch

from teal.kernels.cuda.tile_config import WARP, TileConfig, bits_of
from teal.kernels.cuda.tuned_configs import Task, nearest, tuned_config

# Most activations of a chunk per thread: they take registers.
_INPUTS_OF_ONE_ROW, _INPUTS_OF_ROWS = 8, 40
# Fewest columns per thread, by bits per weight.
_LEAST_PER_LANE = {16: 4, 8: 8, 4: 8}
_INT4_BITS = 4
_WARPS_WITHOUT_CLUSTERS = 16
# If a warp adds up several groups of int4, each has sums of its own, which take registers.
_UNROLL_OF_GROUPS = 8
# Per block.
_MOST_THREADS = 1024
# Shared memory that a block may have on every GPU that the kernels run on.
_SHARED_BYTES = 96 * 1024


@dataclass(frozen=True, kw_only=True)
class Product:
    """Size and format of a product.

    Attributes:
        in_features: Channels.
        output_sizes: Columns of each part, or of gate and of up.
        dtype: Dtype of the weight or its codes.
        is_gated: The parts are gate and up, which share blocks.
        group_size: Channels that share a scale; 0 if all of them do.
        group_bytes: Bytes of scale and zero per group and column.
        rows: Rows of activations that are multiplied at once.
    """

    in_features: int
    output_sizes: tuple[int, ...]
    dtype: torch.dtype
    is_gated: bool = False
    group_size: int = 0
    group_bytes: int = 0
    rows: int = 1

    @property
    def outputs(self) -> tuple[int, ...]:
        """Columns of the result, by part."""
        return self.output_sizes[:1] if self.is_gated else self.output_sizes

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return bits_of(self.dtype)


@functools.cache
def config_for(
    product: Product, *, clusters: bool, tuning: str = "", device: str = ""
) -> TileConfig:
    """Return how a product is divided into blocks: as the tuning table says for the nearest size.

    Args:
        product: Its size and format.
        clusters: Whether the device has clusters of blocks.
        tuning: Folder of tuning tables, "" for those of the package.
        device: Name of the device that chooses the shipped table.
    """
    task = task_of(product)
    config, known = tuned_config(task, tuning, device), nearest(task, tuning, device)
    if known.rows == 1 < product.rows:
        config = _for_rows(config)
    # A thread has columns of only one part.
    config = replace(config, chunk=WARP, per_lane=math.gcd(config.per_lane, *product.output_sizes))
    if not clusters:
        # More channels for a block take more registers.
        warps_k = min(config.warps_k, _WARPS_WITHOUT_CLUSTERS // config.warps_n)
        config = replace(config, cluster=1, blocks=1, warps_k=warps_k)
    whole = chunked(product, config)
    if tile_columns(product, whole) > whole.threads * whole.cluster:
        # A thread finishes only one column.
        least = min(config.per_lane, _LEAST_PER_LANE[product.bits])
        return chunked(product, replace(config, per_lane=least))
    return whole


def task_of(product: Product) -> Task:
    """Return the key of a product in the tuning table."""
    return Task(
        kernel="product",
        form="gated" if product.is_gated else "plain",
        bits=product.bits,
        is_dense=False,
        in_features=product.in_features,
        out_features=sum(product.output_sizes),
        rows=product.rows,
    )


def tiles(product: Product, config: TileConfig) -> int:
    """Return the number of blocks side by side."""
    return sum(math.ceil(size / tile_columns(product, config)) for size in product.outputs)


def tile_columns(product: Product, config: TileConfig) -> int:
    """Return the number of columns of the result that a block computes."""
    return config.columns // 2 if product.is_gated else config.columns


def chunked(product: Product, config: TileConfig) -> TileConfig:
    """Return `config` with chunks that give every block of a cluster channels and fit into it."""
    inputs = _INPUTS_OF_ONE_ROW if product.rows == 1 else _INPUTS_OF_ROWS
    longest = config.threads * (inputs // product.rows)
    passes = math.ceil(product.in_features / (longest * config.cluster))
    while True:
        unit = _unit(product, config)
        chunk = math.ceil(product.in_features / (config.cluster * passes * unit)) * unit
        if config.cluster > 1 and (config.cluster - 1) * chunk >= product.in_features:
            config = replace(config, cluster=config.cluster // 2)
            continue
        even = _with_even_shares(product, replace(config, chunk=chunk))
        if chunk == unit or shared_bytes(product, even) <= _SHARED_BYTES:
            return even
        passes += 1


def shared_bytes(product: Product, config: TileConfig) -> int:
    """Return an estimate of the shared memory of a block."""
    halves = 2 if product.is_gated else 1
    columns = halves * tile_columns(product, config)
    kept = halves * (9 if product.rows == 1 else 5 + 2 * product.rows) * config.chunk
    # Every warp has scales of its own groups; column scales are shared.
    segments = config.segments_per_warp(product.group_size or config.chunk)
    groups = segments * config.warps_k if product.bits == _INT4_BITS else 1
    return kept + columns * (groups * product.group_bytes + _bytes_of_sums(product, config))


def _bytes_of_sums(product: Product, config: TileConfig) -> int:
    """Return the bytes of a column's sums, from each warp and from each block of the cluster."""
    if product.rows == 1:
        # Sums of threads are padded; see accumulate.cuh.
        return 4 * (config.warps_k * (config.per_lane + 4) // config.per_lane + 1)
    return 8 * math.ceil(product.rows / 2) * (config.warps_k + 1)


def _for_rows(config: TileConfig) -> TileConfig:
    """Return a config for several rows, which fills operands of tensor cores."""
    return replace(config, per_lane=4, warps_n=4, warps_k=4, unroll=16, blocks=1, depth=1)


def _unit(product: Product, config: TileConfig) -> int:
    """Return the unit of chunks."""
    # Groups are scaled whole. If all channels are one group, warps share a chunk evenly.
    return product.group_size or WARP * (config.warps_k if product.bits == _INT4_BITS else 1)


def _with_even_shares(product: Product, config: TileConfig) -> TileConfig:
    """Choose the number of warps that shares the groups of a chunk most evenly."""
    group_size = product.group_size
    if not group_size:
        return config

    def waste(warps: int) -> float:
        shared = replace(config, warps_k=warps)
        return (
            shared.segments_per_warp(group_size) * shared.segment(group_size) * warps / config.chunk
        )

    # A thread finishes at most one column.
    least = math.ceil(tile_columns(product, config) / (config.cluster * WARP * config.warps_n))
    most = min(3 * config.warps_k // 2, _MOST_THREADS // (WARP * config.warps_n))
    around = range(max(least, config.warps_k // 2), most + 1)
    if not around:
        # This configuration does not suit the product; the compiler reports it.
        return config
    warps = min(around, key=lambda number: (waste(number), abs(number - config.warps_k)))
    shared = replace(config, warps_k=warps)
    has_one_sum = (
        shared.segments_per_warp(group_size) == 1
        and config.chunk * config.cluster >= product.in_features
    )
    if not has_one_sum:
        return replace(shared, blocks=1, unroll=min(config.unroll, _UNROLL_OF_GROUPS))
    # A thread keeps as many registers as before.
    return replace(shared, blocks=max(1, config.blocks * config.warps_k // warps))
