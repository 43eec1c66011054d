"""Finds the fastest tile configuration of the CUDA kernel for one product on its own."""

import functools
from dataclasses import replace

from teal.benchmark.gemv import Product

try:
    from teal.benchmark.tuning.search import SearchResult, TileConfigSpace, fastest
    from teal.kernels.cuda import gemv as cuda_gemv
    from teal.kernels.cuda import gemv_config, nvrtc
    from teal.kernels.cuda.nvrtc import Kernel
    from teal.kernels.cuda.tile_config import WARP, TileConfig
    from teal.kernels.cuda.tuned_configs import Task
except ImportError:
    cuda_gemv = None  # type: ignore[assignment]

# Products are tuned at this sparsity.
SPARSITY = 0.5

# A cluster runs within one of the GPU's large groups of multiprocessors (GPCs). A whole one has 18
# (NVIDIA's H100 whitepaper), which three clusters of six fill.
_CLUSTERS = (8, 8, 6, 6, 4, 2)
_WARPS_N = {False: (1, 1, 2), True: (2, 4, 8)}  # gate and up take half of the warps each
# With several rows, a warp may take a quarter of the columns.
_WARPS_N_OF_ROWS = {False: (1, 2, 4), True: (2, 4, 8)}
_MOST_THREADS = 1024


def has_kernel(product: Product) -> bool:
    """Tell whether the CUDA kernel can compute a product at `SPARSITY`."""
    operands, quant = product.operands(0, product.threshold(SPARSITY))
    if cuda_gemv is None or not product.x.is_cuda:
        return False
    return cuda_gemv.CudaBackend().can_run(operands, quant) is None


def tune(product: Product) -> "tuple[Task, SearchResult]":
    """Search for the best configuration of a product at 50 % sparsity.

    Args:
        product: Shape and inputs; `has_kernel` must hold.
    """
    threshold = product.threshold(SPARSITY)
    product.check(threshold)
    trial = _Trial(product, threshold)
    found = fastest(trial.space(), trial.known, trial.compile, trial.time)
    return trial.task, replace(found, config=trial.chunked(found.config))


class _Trial:
    """A product that is computed with one configuration after the other."""

    def __init__(self, product: Product, threshold: float) -> None:
        self._product = product
        self._operands = functools.cache(functools.partial(product.operands, threshold=threshold))
        self._sizes = cuda_gemv.product_of(*self._operands(0))
        self.task = gemv_config.task_of(self._sizes)
        clusters = nvrtc.has_clusters(product.x.device)
        self._clusters = _CLUSTERS if clusters else (1,)
        self.known = replace(gemv_config.config_for(self._sizes, clusters=clusters), chunk=WARP)

    def space(self) -> "TileConfigSpace":
        """Return the configurations to try; channels per block follow from the other fields."""
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
        """Return the kernel of a configuration; raise `RuntimeError` if it does not compile."""
        device = self._product.x.device.index
        return cuda_gemv.kernel_of(*self._operands(0), self.chunked(config), device)

    def time(self, config: "TileConfig") -> float:
        """Return the microseconds of the product; raise `RuntimeError` if it does not launch."""
        config, copies = self.chunked(config), self._product.copies
        return self._product.time(
            lambda i: cuda_gemv.compute(*self._operands(i % copies), config)
        ).median

    def chunked(self, config: "TileConfig") -> "TileConfig":
        """Return a configuration with its channels per block filled in."""
        return gemv_config.chunked(self._sizes, config)
