"""Products by the CUDA kernel with a chosen tile configuration, on a GPU or an emulated one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teal.kernels.cuda.gemv import compute
from teal.kernels.cuda.tile_config import TileConfig
from teal.kernels.operands import Operands
from tests.kernels import products
from tests.kernels.emulation import DEVICE
from tests.kernels.products import Weight


def weight_of(scheme: str, in_features: int, columns: int, dtype: torch.dtype) -> Weight:
    return products.weight_of(scheme, in_features, columns, dtype, DEVICE)


def times(weight: Weight, x: Tensor, thresholds: Sequence[float], **rest: Any) -> Tensor:
    return compute(weight.operands(x, thresholds, **rest), weight.quant)


def assert_right(weight: Weight, operands: Operands, config: TileConfig | None = None) -> None:
    products.assert_right(weight, operands, compute(operands, weight.quant, config))
