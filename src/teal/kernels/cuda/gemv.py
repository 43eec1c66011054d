"""Launches the CUDA C++ kernel of a product on its own; see gemv.cu."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teal.kernels.cuda.gemv_config import Product, config_for, tiles
from teal.kernels.cuda.kernel_config import Activation, GemvConfig
from teal.kernels.cuda.nvrtc import FLOAT, Kernel, can_compile, function, has_clusters, launch
from teal.kernels.cuda.tile_config import TileConfig, can_load, product_config
from teal.kernels.operands import MAX_PARTS, Operands, QuantParams, padded_thresholds
from teal.kernels.reference import matmul as reference
from teal.kernels.reference.quantized import INT4
from teal.kernels.tuning import device_name

SOURCE = "gemv.cu"
# Rows of floats are multiplied at once, rows of codes in separate launches.
MAX_ROWS = 8

# Up to so many channels, this kernel was measured to be the fastest for one row of floats.
_MOST_CHANNELS = 1 << 15
# Of addresses, in bytes.
_ALIGNMENT = 16
# The norm reads so many activations at once.
_NORM_UNIT = 8
# Weight rows of a chunk that a dense part prefetches before its input is known.
_PREFETCHED_ROWS = 16


class _Signature(NamedTuple):
    """What a kernel is compiled for, apart from the device."""

    dtype: torch.dtype
    weight: tuple[torch.Size, torch.dtype]
    output_sizes: tuple[int, ...]
    activation: str | None
    has_one_mask: bool
    has_score_scale: bool = False
    has_shift: bool = False
    has_norm: bool = False
    scales: tuple[torch.Size, torch.dtype] | None = None
    has_zeros: bool = False
    group_size: int = 0
    rows: int = 1


class _Prepared(NamedTuple):
    """What a launch needs apart from its arguments."""

    kernel: Kernel
    blocks: tuple[int, int]
    threads: int
    dependent: bool


class CudaBackend:
    """Computes products by the CUDA C++ kernel, on NVIDIA GPUs."""

    name = "cuda"

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str | None:
        """Say why the kernel cannot compute a product, or is not the fastest that can.

        Args:
            operands: Checked operands on one device, with codes as the weight if there is `quant`.
            quant: What decodes the weight; `None` for floats.

        Returns:
            `None` if it can; else a clause.
        """
        # ROCm builds of torch call their devices "cuda" too.
        if torch.version.hip is not None:
            return "it needs an NVIDIA GPU"
        if not can_compile(torch.cuda.get_device_capability(operands.x.device)):
            return "NVIDIA's run-time compiler is not installed or does not know this GPU"
        obstacle = _obstacle(operands, quant)
        return _faster_elsewhere(operands) if obstacle is None and quant is None else obstacle

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        """Compute a product that it can run; see `compute`."""
        return compute(operands, quant)


def _obstacle(operands: Operands, quant: QuantParams | None) -> str | None:
    channels = len(operands.weight)
    if not 1 <= operands.rows <= MAX_ROWS:
        return f"x has no rows, or more than {MAX_ROWS}"
    if channels == 0:
        return "the weight has no channels"
    if len(operands.output_sizes) > MAX_PARTS:
        return f"there are more than {MAX_PARTS} parts"
    if not can_load(operands.weight, quant, operands.output_sizes, operands.x.dtype):
        return "it cannot load a weight of this dtype, layout or width"
    if operands.norm_weight is not None and channels % _NORM_UNIT:
        return f"its norm takes a multiple of {_NORM_UNIT} channels"
    return None


def _faster_elsewhere(operands: Operands) -> str | None:
    """Say which other kernel is faster for a weight of floats."""
    if not has_clusters(operands.x.device):
        # It has more blocks.
        return "Triton's kernel is faster on GPUs without clusters"
    if operands.activation is None and reference.keeps_everything(operands.thresholds):
        return "cuBLAS is faster for a dense product without an activation"
    if operands.rows == 1 and len(operands.weight) > _MOST_CHANNELS:
        return f"Triton's kernel is faster beyond {_MOST_CHANNELS} channels"
    return None


def compute(
    operands: Operands, quant: QuantParams | None = None, config: TileConfig | None = None
) -> Tensor:
    """Multiply the kept activations with a weight.

    Rows of activations are multiplied with floats at once, with codes one by one.

    Sums are accumulated in float32 in a fixed order, so the same input gives the same bits. The
    result is rounded once, after bias, activation and residual.

    Args:
        operands: Operands for which `CudaBackend.can_run` finds no obstacle.
        quant: What decodes the weight; `None` for floats.
        config: How to divide the product into blocks; by default as the tuning table says.

    Returns:
        (..., N), or (..., N / 2) with an activation, in the dtype of `x`.

    Raises:
        UserError: The kernel is not loaded yet, and the stream is being captured.
    """
    x, weight, residual = operands.x, operands.weight, operands.residual
    columns = sum(operands.output_sizes) // (2 if operands.activation else 1)
    with torch.cuda.device(x.device):
        prepared = _prepared(_signature(operands, quant), config, operands.tuning, x.device)
        rows = _readable(x.reshape(-1, x.shape[-1]))
        result = torch.empty(len(rows), columns, dtype=x.dtype, device=x.device)
        common = (
            weight,
            *((None, None) if quant is None else quant[:2]),
            *map(_as_floats, (operands.norm_weight, operands.score_scale, operands.shift)),
            None if operands.bias is None else operands.bias.contiguous(),
        )
        thresholds = padded_thresholds(operands.thresholds)
        numbers = [(number, FLOAT) for number in (*thresholds, operands.eps)]
        added = None if residual is None else residual.reshape(-1, columns).contiguous()
        for row in range(0, len(rows), _rows_at_once(operands, quant)):
            added_here = None if added is None else added[row:]
            launch(
                prepared.kernel,
                prepared.blocks,
                prepared.threads,
                [rows[row:], *common, added_here, result[row:], *numbers],
                dependent=prepared.dependent,
            )
    return result.view(*x.shape[:-1], columns)


def product_of(operands: Operands, quant: QuantParams | None) -> Product:
    """Return the size and format of a product.

    Args:
        operands: Operands as in `compute`; only shapes and dtypes are read.
        quant: What decodes the weight; `None` for floats.
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


def gemv_config_of(operands: Operands, quant: QuantParams | None, config: TileConfig) -> GemvConfig:
    """Return what the kernel is compiled for.

    Args:
        operands: Operands as in `compute`; only shapes and dtypes are read, and whether thresholds
            differ.
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
        operands: Operands as in `compute`; only shapes and dtypes are read, and whether thresholds
            differ.
        quant: What decodes the weight; `None` for floats.
        config: How the product is divided into blocks.
        device: Index of the CUDA device.
    """
    return function(SOURCE, "gemv", gemv_config_of(operands, quant, config), device)


@functools.cache
def _prepared(
    signature: _Signature, config: TileConfig | None, tuning: str, device: torch.device
) -> _Prepared:
    operands, quant = _shapes_of(signature)
    product = product_of(operands, quant)
    clusters = has_clusters(device)
    if config is None:
        config = config_for(product, clusters=clusters, tuning=tuning, device=device_name(device))
    kernel = kernel_of(operands, quant, config, device.index)
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
    """Return operands on the meta device, with thresholds that differ if the masks do."""

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
        score_scale=vector if signature.has_score_scale else None,
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
