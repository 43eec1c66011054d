"""Times the decoding of one sequence, dense and sparse, beside the byte limit and other engines."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from teal.benchmark.baselines import Baseline
from teal.benchmark.bytes_read import WeightsRead
from teal.benchmark.environment import PeakMemory
from teal.benchmark.model import BenchmarkModel
from teal.benchmark.timing import Timing, summary_of
from teal.engine.engine import Engine
from teal.foundation.progress import Progress, silent

OURS = "teal"

# Name and target sparsity.
_Runner = tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Cost of a runner's first call, with its weights in memory.

    Attributes:
        seconds: Time beyond that of later calls: kernels compiled or loaded, graphs captured.
        bytes: Peak memory of our first call beyond weights and KV cache; `None` for a baseline, and
            on a CPU.
    """

    seconds: float
    bytes: int | None


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """How fast one runner decoded one model.

    Attributes:
        model: Name of the model.
        runner: "teal", or the name of a baseline.
        dtype: Dtype of activations and of float weights.
        weights: Formats of the weights; floats for a baseline.
        prompt_tokens: Tokens in the prompt.
        new_tokens: Tokens decoded.
        sparsity: Target sparsity; 0 is dense.
        effective_sparsity: Mean over decode steps, weighted by weight size.
        token: Time per token after the first, over repeats, in microseconds.
        read: Bytes that a token has to read: kept weights, scales, head, keys and values.
        bandwidth: Bytes per second that memory can deliver.
        speed_up: Time of our dense decoding with the same weights ÷ this time.
        start: Cost of the first call.
    """

    model: str
    runner: str
    dtype: str
    weights: WeightsRead
    prompt_tokens: int
    new_tokens: int
    sparsity: float
    effective_sparsity: float
    token: Timing
    read: int
    bandwidth: float
    speed_up: float
    start: Start

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of decoding."""
        return 1e6 / self.token.median

    @property
    def limit(self) -> float:
        """Microseconds to read `read` bytes at full bandwidth."""
        return self.read / self.bandwidth * 1e6

    @property
    def share_of_limit(self) -> float:
        """Limit ÷ time."""
        return self.limit / self.token.median

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens_per_second,
            "limit": self.limit,
            "share_of_limit": self.share_of_limit,
        }


def measure(
    model: BenchmarkModel,
    sparsities: Sequence[float],
    baselines: Sequence[Baseline],
    bandwidth: float,
    progress: Progress = silent,
) -> list[DecodeResult]:
    """Time our engine, dense and sparse, and baselines; repeats take turns.

    Args:
        model: The model.
        sparsities: Targets in [0, 1).
        baselines: Other engines with a model of the same shapes.
        bandwidth: Bytes per second that memory can deliver.
        progress: Shows progress over the repeats.

    Returns:
        Dense first, then a result per sparsity and one per baseline.

    Raises:
        UserError: A decode step is wrong.
    """
    model.check()
    engines = model.engines(tuple(dict.fromkeys((0.0, *sparsities))))
    calls: dict[_Runner, Callable[[], float]] = {
        (OURS, sparsity): partial(_decode, model, engine) for sparsity, engine in engines.items()
    }
    for baseline in baselines:
        calls[baseline.name, 0.0] = partial(baseline.time, model.prompt, model.workload.new_tokens)
    times, starts = _interleaved(model, calls, progress)
    effective = {sparsity: model.effective_sparsity(engine) for sparsity, engine in engines.items()}
    dense = times[OURS, 0.0].median
    return [
        _result(
            model,
            runner,
            timing,
            starts[runner],
            effective=effective[runner[1]],
            bandwidth=bandwidth,
            dense=dense,
        )
        for runner, timing in times.items()
    ]


def _interleaved(
    model: BenchmarkModel,
    calls: Mapping[_Runner, Callable[[], float]],
    progress: Progress,
) -> tuple[dict[_Runner, Timing], dict[_Runner, Start]]:
    # The first round compiles and captures, at the size of all others.
    rounds = [runner for _ in range(model.workload.repeats + 1) for runner in calls]
    times: dict[_Runner, list[float]] = {runner: [] for runner in calls}
    seconds: dict[_Runner, list[float]] = {runner: [] for runner in calls}
    memory: dict[_Runner, int | None] = {}
    for runner in progress(rounds, f"Decoding {model.name}"):
        peak = PeakMemory(model.device)
        begun = time.perf_counter()
        times[runner].append(calls[runner]())
        seconds[runner].append(time.perf_counter() - begun)
        name, _ = runner
        memory.setdefault(runner, peak.beyond(model.bytes_of_cache()) if name == OURS else None)
    starts = {
        runner: Start(seconds=first - statistics.median(later), bytes=memory[runner])
        for runner, (first, *later) in seconds.items()
    }
    return {runner: summary_of(values[1:]) for runner, values in times.items()}, starts


def _decode(model: BenchmarkModel, engine: Engine) -> float:
    number = model.workload.new_tokens
    result = engine.generate(model.prompt, max_new_tokens=number, stop_tokens=())
    return 1e6 / result.tokens_per_second


def _result(
    model: BenchmarkModel,
    runner: _Runner,
    timing: Timing,
    start: Start,
    *,
    effective: Mapping[str, float],
    bandwidth: float,
    dense: float,
) -> DecodeResult:
    name, sparsity = runner
    is_ours = name == OURS
    return DecodeResult(
        model=model.name,
        runner=name,
        dtype=model.dtype,
        weights=model.weights if is_ours else WeightsRead(),
        prompt_tokens=model.workload.prompt_tokens,
        new_tokens=model.workload.new_tokens,
        sparsity=sparsity,
        effective_sparsity=model.mean_sparsity(effective),
        token=timing,
        read=model.bytes_read(effective) if is_ours else model.bytes_of_floats(),
        bandwidth=bandwidth,
        speed_up=dense / timing.median,
        start=start,
    )
