"""Finds the fastest config of the CUDA kernel for one product on its own."""

import functools
from dataclasses import replace

from teal.benchmark.gemv import Product

try:
    from teal.benchmark.tuning.search import Found, TileConfigSpace, fastest
    from teal.kernels.cuda import gemv as cuda_gemv
    from teal.kernels.cuda import gemv_config, nvrtc
    from teal.kernels.cuda.nvrtc import Kernel
    from teal.kernels.cuda.tile_config import WARP, TileConfig
    from teal.kernels.cuda.tuned_configs import Task
except ImportError:
    cuda_gemv = None  # type: ignore[assignment]

# Cuts are compared here.
SPARSITY = 0.5

# A cluster runs within one of the GPU's large groups of multiprocessors (GPCs). A whole one has 18
# (NVIDIA's H100 whitepaper), which three clusters of six fill.
_CLUSTERS = (8, 8, 6, 6, 4, 2)
_WARPS_N = {False: (1, 1, 2), True: (2, 4, 8)}  # gate and up take half of the warps each
# Of several rows a warp may have a quarter of the columns.
_WARPS_N_OF_ROWS = {False: (1, 2, 4), True: (2, 4, 8)}
_MOST_THREADS = 1024


def has_kernel(product: Product) -> bool:
    """Tell whether the CUDA kernel computes a product at `SPARSITY`."""
    operands, quant = product.operands(0, product.threshold(SPARSITY))
    if cuda_gemv is None or not product.x.is_cuda:
        return False
    return cuda_gemv.CudaBackend().can_run(operands, quant) is None


def tune(product: Product) -> "tuple[Task, Found]":
    """Search the config of a product at 50 % sparsity, on weights that no cache holds.

    Args:
        product: Shape and inputs, such that `has_kernel`.
    """
    threshold = product.threshold(SPARSITY)
    product.check(threshold)
    trial = _Trial(product, threshold)
    found = fastest(trial.space(), trial.known, trial.compile, trial.time)
    return trial.task, replace(found, config=trial.chunked(found.config))


class _Trial:
    """A product, config in several ways."""

    def __init__(self, product: Product, threshold: float) -> None:
        self._product = product
        self._operands = functools.cache(functools.partial(product.operands, threshold=threshold))
        self._sizes = cuda_gemv.product_of(*self._operands(0))
        self.task = gemv_config.task_of(self._sizes)
        clusters = nvrtc.has_clusters(product.x.device)
        self._clusters = _CLUSTERS if clusters else (1,)
        self.known = replace(gemv_config.config_for(self._sizes, clusters=clusters), chunk=WARP)

    def space(self) -> "TileConfigSpace":
        """Return the configs to try; the channels of a block follow from the rest."""
        warps_n = _WARPS_N if self._sizes.rows == 1 else _WARPS_N_OF_ROWS
        return TileConfigSpace(
            bits=self._sizes.bits,
            chunks=(WARP,),
            clusters=self._clusters,
            warps_n=warps_n[self._sizes.is_gated],
            most_threads=_MOST_THREADS,
            rows=self._sizes.rows,
        )

    def compile(self, config: "TileConfig") -> "Kernel":
        """Return the kernel of a config; a `RuntimeError` says that this cannot be."""
        device = self._product.x.device.index
        return cuda_gemv.kernel_of(*self._operands(0), self.chunked(config), device)

    def time(self, config: "TileConfig") -> float:
        """Return the microseconds of the product; a `RuntimeError` says that the config is none."""
        config, copies = self.chunked(config), self._product.copies
        return self._product.time(
            lambda i: cuda_gemv.compute(*self._operands(i % copies), config)
        ).median

    def chunked(self, config: "TileConfig") -> "TileConfig":
        """Return a config with the channels that a block has."""
        return gemv_config.chunked(self._sizes, config)
