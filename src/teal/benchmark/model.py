"""A model to be timed: engines with thresholds set on the spot, and the bytes they read."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.benchmark.bytes_read import (
    WeightsRead,
    bytes_of_cache_read,
    bytes_of_float_weights,
    bytes_of_weights_kept,
)
from teal.engine.decoder import Decoder
from teal.engine.engine import Engine
from teal.engine.kv_cache import KeyValueCache
from teal.engine.layers import Observer
from teal.engine.weights.loader import OpenedModel
from teal.foundation.errors import UserError
from teal.foundation.provenance import TextProvenance
from teal.foundation.version import __version__
from teal.kernels.reference.matmul import keep_mask
from teal.methods import MaskRule
from teal.plan import PlannedProjection, SparsityPlan

_CALIBRATION_TOKENS = 128
_OBSERVED_STEPS = 16
# Relative to the standard deviation of the logits. A step and a prefill add in different orders in
# every layer; a wrong product moves the logits by more than they vary.
_LARGEST_ERROR = 0.2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is decoded, and how often.

    Attributes:
        prompt_tokens: Random tokens in the prompt.
        new_tokens: Tokens to decode.
        repeats: Interleaved repeats.

    Raises:
        UserError: A number is too small to measure anything.
    """

    prompt_tokens: int
    new_tokens: int
    repeats: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 2 or self.repeats < 1:
            raise UserError(
                f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens and "
                f"{self.repeats} repeats were asked for. Give at least 1, 2 and 1."
            )


class BenchmarkModel:
    """A model and its engines, which share its weights.

    Args:
        name: Name in tables.
        opened: The model.
        workload: What is decoded.
        tuning: Folder of tuning tables, or "" for those of the package.

    Attributes:
        name: Name in tables.
        workload: What is decoded.
        prompt: Random token ids.
        capacity: Tokens that a cache has to hold.

    Raises:
        UserError: The workload exceeds the model's context.
    """

    def __init__(
        self, name: str, opened: OpenedModel, workload: Workload, *, tuning: str = ""
    ) -> None:
        self.name = name
        self.workload = workload
        self._tuning = tuning
        self._opened = opened
        self._weights = opened.weights
        self._architecture = opened.architecture
        self.capacity = max(
            workload.prompt_tokens + max(workload.new_tokens, _OBSERVED_STEPS), _CALIBRATION_TOKENS
        )
        if self.capacity > self._architecture.max_context:
            raise UserError(
                f"{self.capacity} tokens exceed the context of {name}, "
                f"{self._architecture.max_context}. Give fewer prompt tokens or new ones."
            )
        self.prompt: list[int] = self._random_tokens(workload.prompt_tokens).tolist()
        layers = range(self._architecture.num_layers)
        self._inputs = {
            entry.name: tuple(entry.output_sizes)
            for layer in layers
            for entry in self._architecture.inputs(layer)
        }

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype."""
        return str(self._weights.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Device that holds the weights."""
        return self._weights.device

    @property
    def weights(self) -> WeightsRead:
        """Formats of the projections and the head."""
        return WeightsRead.of(self._weights)

    def check(self) -> None:
        """Compare the logits of a step with those of a prefill of the same tokens.

        Raises:
            UserError: They differ by more than rounding explains.
        """
        decoder, cache = self._dense(), self._cache()
        tokens = self._random_tokens(self.workload.prompt_tokens + 1)
        expected = decoder.prefill(tokens, cache)
        cache.reset()
        decoder.prefill(tokens[:-1], cache)
        difference = decoder.step(tokens[-1:].to(self._weights.device), cache)[0] - expected
        error = float(difference.square().mean().sqrt() / expected.std())
        # Written so that NaN fails too.
        if not error <= _LARGEST_ERROR:
            raise UserError(
                f"The logits of a step of {self.name} are {error:.1e} off those of a prefill. "
                "Times of a wrong step are not shown; please report this."
            )

    def engines(self, sparsities: Sequence[float]) -> dict[float, Engine]:
        """Make an engine per sparsity; 0 is dense.

        Thresholds are quantiles of the inputs of a dense pass over random tokens.

        Args:
            sparsities: Targets in [0, 1).
        """
        thresholds = self._thresholds(sparsities)
        return {
            sparsity: Engine(
                self._opened,
                self._plan(sparsity, thresholds[sparsity]) if sparsity else None,
                capacity=self.capacity,
                tuning=self._tuning or None,
            )
            for sparsity in sparsities
        }

    def effective_sparsity(self, engine: Engine) -> dict[str, float]:
        """Measure the fraction of its input that each projection drops in decode steps."""
        decoder = engine.decoder()
        if not decoder.rules:
            return {}
        cache = self._cache()
        dropped: dict[str, list[Tensor]] = {}

        def observe(name: str, x: Tensor) -> None:
            for projection in self._inputs[name]:
                rule = decoder.rules.get(projection)
                if rule:
                    keep = keep_mask(x, rule.threshold)
                    dropped.setdefault(projection, []).append((~keep).float().mean())

        decoder.prefill(torch.tensor(self.prompt), cache)
        with _observed(decoder, observe):
            for token in self._random_tokens(_OBSERVED_STEPS).to(self._weights.device):
                decoder.step(token[None], cache)
        return {name: float(torch.stack(values).mean()) for name, values in dropped.items()}

    def bytes_read(self, sparsities: Mapping[str, float]) -> int:
        """Return the bytes that a token reads half-way through decoding.

        Args:
            sparsities: Effective sparsity by projection; projections that are not named are dense.

        Returns:
            Bytes of kept weights, all scales and zeros, the head, keys and values.
        """
        kept = bytes_of_weights_kept(self._architecture, self._weights, sparsities)
        return round(kept + self._bytes_cached())

    def bytes_of_floats(self) -> int:
        """Return the bytes that a token reads if no weight is quantized and none is skipped."""
        floats = bytes_of_float_weights(self._architecture, self._weights.dtype)
        return floats + self._bytes_cached()

    def bytes_of_cache(self) -> int:
        """Return the bytes of a sequence's keys and values."""
        a = self._architecture
        return 2 * a.num_layers * a.kv_size * self.capacity * self._weights.dtype.itemsize

    def mean_sparsity(self, sparsities: Mapping[str, float]) -> float:
        """Return the mean over all projections, weighted by weight size."""
        dense = dict.fromkeys(self._architecture.identity.shapes, 0.0)
        return self._architecture.identity.mean_sparsity(dense | dict(sparsities))

    def _bytes_cached(self) -> int:
        length = self.workload.prompt_tokens + self.workload.new_tokens // 2
        return bytes_of_cache_read(self._architecture, length, self._weights.dtype)

    def _thresholds(self, sparsities: Sequence[float]) -> dict[float, dict[str, float]]:
        found: dict[float, dict[str, float]] = {sparsity: {} for sparsity in sparsities}

        def observe(name: str, x: Tensor) -> None:
            magnitudes = x.float().abs().flatten().sort().values
            for sparsity in sparsities:
                index = max(0, round(sparsity * len(magnitudes)) - 1)
                found[sparsity][name] = float(magnitudes[index])

        decoder = self._dense()
        with _observed(decoder, observe):
            decoder.prefill(self._random_tokens(_CALIBRATION_TOKENS), self._cache())
        return found

    def _plan(self, sparsity: float, thresholds: Mapping[str, float]) -> SparsityPlan:
        return SparsityPlan(
            model=self._architecture.identity,
            projections={
                projection: PlannedProjection(
                    target_sparsity=sparsity, rule=MaskRule(threshold=threshold)
                )
                for name, threshold in thresholds.items()
                for projection in self._inputs[name]
            },
            method="teal",
            strategy="uniform",
            target_sparsity=sparsity,
            calibration=TextProvenance(
                source="random tokens",
                sha256=None,
                offset=0,
                num_tokens=_CALIBRATION_TOKENS,
                sequence_length=_CALIBRATION_TOKENS,
            ),
            dtype=self.dtype,
            weight_format=self._opened.weight_format,
            library_version=__version__,
        )

    def _random_tokens(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(self._architecture.vocab_size, (number,), generator=generator)

    def _dense(self) -> Decoder:
        return Decoder(self._architecture, self._weights)

    def _cache(self) -> KeyValueCache:
        return KeyValueCache(
            self._architecture,
            1,
            self.capacity,
            self._weights.dtype,
            self._weights.device,
        )


@contextmanager
def _observed(decoder: Decoder, observe: Observer) -> Iterator[None]:
    decoder.observer = observe
    try:
        yield
    finally:
        decoder.observer = None
