"""Finds the fastest tile configurations for the products of a fused decode step."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from teal.benchmark.model import BenchmarkModel
from teal.benchmark.timing import time_graph
from teal.engine.decoder import Decoder
from teal.engine.fused_step import FusedStep, fused_step_obstacle
from teal.engine.kv_cache import KeyValueCache
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent

try:
    from teal.benchmark.tuning.search import SearchResult, TileConfigSpace, fastest
    from teal.kernels.cuda import decode_step, nvrtc
    from teal.kernels.cuda.nvrtc import Kernel
    from teal.kernels.cuda.tile_config import TileConfig, bits_of
    from teal.kernels.cuda.tuned_configs import Task
except ImportError:
    decode_step = None  # type: ignore[assignment]

# Sparse products are tuned at this sparsity, in the middle of what models tolerate with little
# loss; dense products have configurations of their own.
SPARSITY = 0.45

# Largest first: the rest is then tuned beside the new configurations of these.
_NAMES = ("down", "gate_up", "qkv", "o")
_CHUNKS_OF_CLUSTERS = (256, 512, 512, 608, 704, 832, 1024)
_CHUNKS = (64, 96, 128, 160, 192, 256, 256, 320, 384, 512, 608, 768, 1024)
_MOST_THREADS = 512
# A block that computes the norm shares it with its cluster.
_CLUSTERS = (8, 8, 4)
_REPLAYS, _REPEATS = 10, 3


def tune(
    model: BenchmarkModel, progress: Progress = silent
) -> "Iterator[tuple[Task, SearchResult]]":
    """Search for the best configuration of each product, dense and at 45 % sparsity.

    A configuration is judged by the time of a whole step.

    Args:
        model: A model on a GPU that decodes with the fused step.
        progress: Shows progress over the searches.

    Yields:
        Each product and its fastest configuration, with the time of a step.

    Raises:
        UserError: The model does not decode with the fused step here.
    """
    engines = model.engines([0.0, SPARSITY])
    decoders = [engine.decoder() for engine in engines.values()]
    caches = {decoder: _cache_of(decoder, model) for decoder in decoders}
    searches = [(decoder, name) for decoder in decoders for name in _NAMES]
    found: dict[Decoder, dict[str, TileConfig]] = {decoder: {} for decoder in decoders}
    for decoder, name in progress(searches, f"Configurations for {model.name}"):
        trial = _Trial(decoder, caches[decoder], name, found[decoder])
        result = fastest(trial.space(), trial.known, trial.compile, trial.time)
        found[decoder][name] = result.config
        yield trial.task, result


@torch.inference_mode()
def _cache_of(decoder: Decoder, model: BenchmarkModel) -> KeyValueCache:
    """Return a cache that holds the prompt: after an empty one, other channels are kept."""
    weights = decoder.weights
    cache = KeyValueCache(decoder.architecture, 1, model.capacity, weights.dtype, weights.device)
    reason = fused_step_obstacle(decoder, cache)
    if reason:
        raise UserError(
            f"There is nothing to tune: {reason}. Run --tune on a GPU with a model that decodes "
            "with the fused step."
        )
    decoder.prefill(torch.tensor(model.prompt), cache)
    return cache


class _Trial:
    """Steps of a decoder that try configurations of one product; the others keep what was found."""

    def __init__(
        self, decoder: Decoder, cache: KeyValueCache, name: str, found: "dict[str, TileConfig]"
    ) -> None:
        self._decoder, self._cache, self._name, self._found = decoder, cache, name, found
        device = decoder.weights.device
        step = FusedStep(decoder, cache)
        self._memory = step.memory
        self._projections = getattr(step.layers[0], name)
        self.task = decode_step.task_of(self._projections)
        self.known = decode_step.config_for(self._projections, clusters=nvrtc.has_clusters(device))
        self._token = torch.zeros(1, dtype=torch.int64, device=device)

    def space(self) -> "TileConfigSpace":
        """Return the configurations to try."""
        has_norm = self._projections.norm_weight is not None
        return TileConfigSpace(
            bits=bits_of(self._projections.weight.dtype),
            chunks=_CHUNKS_OF_CLUSTERS if has_norm else _CHUNKS,
            clusters=_CLUSTERS if has_norm else (1,),
            warps_n=(1, 1, 2, 4),
            most_threads=_MOST_THREADS,
        )

    def compile(self, config: "TileConfig") -> "Kernel":
        """Return the kernel of a configuration; raise `RuntimeError` if it does not compile."""
        projections, device = replace(self._projections, config=config), self._token.device
        config = decode_step.config_for(projections, clusters=nvrtc.has_clusters(device))
        return decode_step.kernel_of(projections, config, self._memory)

    @torch.inference_mode()
    def time(self, config: "TileConfig") -> float:
        """Return the microseconds of a step; raise `RuntimeError` if it does not launch."""
        step = FusedStep(self._decoder, self._cache, configs={**self._found, self._name: config})

        # Back to the same position every time: other positions keep other channels.
        def work() -> None:
            step(self._token, self._cache)
            self._cache.positions.sub_(1)

        # Not captured, so that a launch that fails spoils no graph.
        work()
        return time_graph(work, _REPLAYS, _REPEATS)
