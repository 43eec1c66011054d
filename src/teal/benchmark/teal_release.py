"""TEAL's own kernels, from a checkout of FasterDecoding/TEAL."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from teal.benchmark.gemv import Product
from teal.benchmark.timing import Timing
from teal.foundation.errors import UserError

_FILE = "kernels/sparse_gemv.py"
_WRAPPER = "compile_wrapper"


class TealKernels:
    """TEAL's kernels for one row in float16, with their own autotuning.

    Args:
        checkout: Folder of FasterDecoding/TEAL.

    Raises:
        UserError: The folder is something else.
    """

    def __init__(self, checkout: Path) -> None:
        path = checkout / _FILE
        if not path.is_file():
            raise UserError(
                f"{str(checkout)!r} holds no {_FILE}. Give a checkout of FasterDecoding/TEAL."
            )
        self._kernels = _load(path)

    def time(self, product: Product, threshold: float, sparsity: float) -> Timing | None:
        """Time the same product, without the activation; `None` if there is no kernel for it."""
        if len(product.x) != 1 or product.x.dtype != torch.float16:
            return None
        number = len(product.weights)

        def call(i: int) -> Tensor:
            return self._call(product, product.weights[i % number].t(), threshold, sparsity)

        return product.time(call)

    def _call(self, product: Product, weight: Tensor, threshold: float, sparsity: float) -> Tensor:
        x, percent = product.x[None], int(sparsity * 100)
        if product.shape.form == "parts":
            result: Tensor = self._kernels.qkv_gemv(
                x, weight, *[threshold] * 3, percent, product.shape.output_sizes[-1]
            )
        else:
            result = self._kernels.splitk_sparse_gemv(x, weight, threshold, percent)
        return result


def _load(path: Path) -> Any:
    # Its wrapper for torch.compile would define a second library named "teal".
    stub = ModuleType(_WRAPPER)
    stub.BaseKernel = object  # type: ignore[attr-defined]
    before = list(sys.path)
    sys.modules[_WRAPPER] = stub
    try:
        spec = importlib.util.spec_from_file_location("teal_release_kernels", path)
        if spec is None or spec.loader is None:
            raise UserError(f"Cannot import {str(path)!r}. Give a checkout of FasterDecoding/TEAL.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        del sys.modules[_WRAPPER]
        sys.path[:] = before
    return module
