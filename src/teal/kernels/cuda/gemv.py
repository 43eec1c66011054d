"""Launches the CUDA C++ kernel of a product on its own; see gemv.cu."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teal.kernels.cuda.gemv_config import Product, config_for, tiles
from teal.kernels.cuda.kernel_config import Activation, GemvConfig
from teal.kernels.cuda.nvrtc import (
    FLOAT,
    Kernel,
    can_compile,
    function,
    has_clusters,
    launch,
)
from teal.kernels.cuda.tile_config import TileConfig, can_load, product_config
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference import matmul as reference
from teal.kernels.reference.quantized import INT4

SOURCE = "gemv.cu"
MAX_PARTS = 3
# Those of floats are multiplied at once, those of codes in launches of their own.
MAX_ROWS = 8

# Channels of the longest weight of floats for which this was measured to be the fastest.
_LONGEST = 1 << 15
# Of addresses, in bytes.
_ALIGNMENT = 16
# A norm reads so many activations at once.
_NORM_PIECE = 8
# Strips of a chunk that a dense part asks for before its input is known.
_PREFETCHED_ROWS = 16


class _Signature(NamedTuple):
    """What a kernel is compiled for, beside the device."""

    dtype: torch.dtype
    weight: tuple[torch.Size, torch.dtype]
    output_sizes: tuple[int, ...]
    activation: str | None
    has_one_mask: bool
    has_scale: bool = False
    has_shift: bool = False
    has_norm: bool = False
    scales: tuple[torch.Size, torch.dtype] | None = None
    has_zeros: bool = False
    group_size: int = 0
    rows: int = 1


class _Prepared(NamedTuple):
    """What a launch needs beside its arguments."""

    kernel: Kernel
    blocks: tuple[int, int]
    threads: int
    dependent: bool


def can_compute(operands: Operands, quant: QuantParams | None) -> bool:
    """Tell whether the kernel computes a product, and is the fastest that does.

    Args:
        operands: Checked, on one CUDA device; codes as the weight where there is a quant.
        quant: What the codes stand for; `None` for floats.
    """
    weight, rows = operands.weight, operands.rows
    capability = torch.cuda.get_device_capability(operands.x.device)
    return (
        (quant is not None or _is_wanted_of_floats(operands))
        and 1 <= rows <= MAX_ROWS
        and len(weight) > 0
        and len(operands.output_sizes) <= MAX_PARTS
        and can_load(weight, quant, operands.output_sizes, operands.x.dtype)
        and (operands.norm_weight is None or len(weight) % _NORM_PIECE == 0)
        and can_compile(capability)
    )


def _is_wanted_of_floats(operands: Operands) -> bool:
    if not has_clusters(operands.x.device):
        # Triton's kernel has more blocks.
        return False
    # Dense products are cuBLAS's, unless an activation follows.
    is_dense = reference.keeps_everything(operands.thresholds)
    is_wanted = operands.activation is not None or not is_dense
    return is_wanted and (operands.rows > 1 or len(operands.weight) <= _LONGEST)


def compute(
    operands: Operands, quant: QuantParams | None = None, config: TileConfig | None = None
) -> Tensor:
    """Multiply the kept activations with a weight, rows of floats at once, of codes one by one.

    Sums are in float32 and in one fixed order, so the same input gives the same bits. The result is
    rounded once, after bias, activation and residual.

    Args:
        operands: Such that `can_compute`.
        quant: What codes stand for; `None` for floats.
        config: How to config the product; by default what is fast for its size and format.

    Returns:
        (..., out_features), or (..., out_features / 2) with an activation, in the dtype of `x`.

    Raises:
        UserError: The kernel is not loaded yet, and the stream is being captured.
    """
    x, weight, residual = operands.x, operands.weight, operands.residual
    columns = sum(operands.output_sizes) // (2 if operands.activation else 1)
    with torch.cuda.device(x.device):
        prepared = _prepared(_signature(operands, quant), config, x.device.index)
        rows = _readable(x.reshape(-1, x.shape[-1]))
        result = torch.empty(len(rows), columns, dtype=x.dtype, device=x.device)
        common = (
            weight,
            *((None, None) if quant is None else quant[:2]),
            *map(_as_floats, (operands.norm_weight, operands.score_scale, operands.shift)),
            None if operands.bias is None else operands.bias.contiguous(),
        )
        thresholds = (*operands.thresholds, 0.0, 0.0)[:MAX_PARTS]
        numbers = [(number, FLOAT) for number in (*thresholds, operands.eps)]
        added = None if residual is None else residual.reshape(-1, columns).contiguous()
        for row in range(0, len(rows), _rows_at_once(operands, quant)):
            launch(
                prepared.kernel,
                prepared.blocks,
                prepared.threads,
                [
                    rows[row:],
                    *common,
                    None if added is None else added[row:],
                    result[row:],
                    *numbers,
                ],
                dependent=prepared.dependent,
            )
    return result.view(*x.shape[:-1], columns)


def product_of(operands: Operands, quant: QuantParams | None) -> Product:
    """Return what the config of a product depends on.

    Args:
        operands: As `compute`; only shapes and dtypes are read.
        quant: As `compute`.
    """
    is_grouped = quant is not None and len(quant.scales) > 1
    return Product(
        in_features=len(operands.weight),
        output_sizes=tuple(operands.output_sizes),
        dtype=operands.weight.dtype,
        is_gated=operands.activation is not None,
        group_size=quant.group_size if quant is not None and is_grouped else 0,
        group_bytes=0 if quant is None else quant.scales.itemsize + (quant.zeros is not None),
        rows=_rows_at_once(operands, quant),
    )


def gemv_config_of(
    operands: Operands, quant: QuantParams | None, config: TileConfig
) -> GemvConfig:
    """Return what the kernel is compiled for.

    Args:
        operands: As in `compute`; only shapes and dtypes are read, and whether thresholds differ.
        quant: What decodes the weight; `None` for floats.
        config: How the product is divided into blocks.
    """
    rows = _rows_at_once(operands, quant)
    return GemvConfig(
        product=product_config(
            operands.weight, quant, operands.output_sizes, operands.x.dtype, config, rows
        ),
        activation=Activation(operands.activation),
        has_norm=operands.norm_weight is not None,
        has_one_mask=_has_one_mask(operands),
        has_score_scale=operands.score_scale is not None,
        has_shift=operands.shift is not None,
        prefetched_rows=_PREFETCHED_ROWS,
    )


def kernel_of(
    operands: Operands, quant: QuantParams | None, config: TileConfig, device: int
) -> Kernel:
    """Return the kernel that `compute` launches, compiled at the first call.

    Args:
        operands: As `definitions_of`, and so the rest.
        quant: What the codes stand for.
        config: How the product is config.
        device: Index of the CUDA device.
    """
    return function(SOURCE, "gemv", gemv_config_of(operands, quant, config), device)


@functools.cache
def _prepared(signature: _Signature, config: TileConfig | None, device: int) -> _Prepared:
    operands, quant = _shapes_of(signature)
    product = product_of(operands, quant)
    clusters = has_clusters(device)
    config = config or config_for(product, clusters=clusters)
    kernel = kernel_of(operands, quant, config, device)
    return _Prepared(kernel, (tiles(product, config), config.cluster), config.threads, clusters)


def _signature(operands: Operands, quant: QuantParams | None) -> _Signature:
    weight = operands.weight
    signature = _Signature(
        operands.x.dtype,
        (weight.shape, weight.dtype),
        tuple(operands.output_sizes),
        operands.activation,
        _has_one_mask(operands),
        operands.score_scale is not None,
        operands.shift is not None,
        operands.norm_weight is not None,
        rows=_rows_at_once(operands, quant),
    )
    if quant is None:
        return signature
    scales, zeros, group_size = quant
    return signature._replace(
        scales=(scales.shape, scales.dtype), has_zeros=zeros is not None, group_size=group_size
    )


def _shapes_of(signature: _Signature) -> tuple[Operands, QuantParams | None]:
    """Return operands without numbers, but for thresholds that differ."""

    def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = empty(*signature.weight)
    vector = empty([len(weight)], torch.float32)
    x = empty([signature.rows, len(weight)], signature.dtype)
    operands = Operands(
        x,
        weight,
        [0.0] if signature.has_one_mask else [0.0, 1.0],
        signature.output_sizes,
        score_scale=vector if signature.has_scale else None,
        shift=vector if signature.has_shift else None,
        norm_weight=vector if signature.has_norm else None,
        activation=signature.activation,
    )
    if signature.scales is None:
        return operands, None
    scales = empty(*signature.scales)
    zeros = empty(scales.shape, INT4) if signature.has_zeros else None
    return operands, QuantParams(scales, zeros, signature.group_size)


def _has_one_mask(operands: Operands) -> bool:
    """Tell whether gate and up keep the same channels; other parts are in blocks of their own."""
    keeps_alike = operands.score_scale is None and len(set(operands.thresholds)) == 1
    return operands.activation is None or keeps_alike


def _readable(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _as_floats(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _rows_at_once(operands: Operands, quant: QuantParams | None) -> int:
    return operands.rows if quant is None else 1
