"""Times the decoding of one stream, dense and sparse, beside the byte limit and other engines."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from teal.benchmark.baselines import Baseline
from teal.benchmark.bytes_read import WeightsRead
from teal.benchmark.memory import MemoryTaken
from teal.benchmark.model import BenchmarkModel
from teal.benchmark.timing import Timing, summary_of
from teal.engine.engine import Engine
from teal.foundation.progress import Progress, silent

OURS = "teal"

# Name of the runner and target sparsity.
_Runner = tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What it takes until a runner decodes, its weights being in memory.

    Attributes:
        seconds: By which the first call took longer: kernels compiled or loaded, graphs captured.
        bytes: Memory that our first call took at most, beyond weights and the cache of keys and
            values; `None` for a baseline, and where the device does not count it.
    """

    seconds: float
    bytes: int | None


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """How fast one runner decoded one model.

    Attributes:
        model: Name of the model.
        runner: "teal", or the name of a baseline.
        dtype: Of activations, and of weights that are floats.
        weights: What the weights are made of; floats for a baseline.
        prompt_tokens: Tokens in the prompt.
        new_tokens: Tokens decoded.
        sparsity: Target; 0 is dense.
        effective_sparsity: Measured over decode steps, weighted by weight size.
        token: Time per token after the first, over repeats, in microseconds.
        read: Bytes that a token has to read: kept weights, scales, head, keys and values.
        bandwidth: Bytes per second that memory can deliver.
        speed_up: Time of our dense decoding with the same weights over this one.
        start: What the first call took beside a later one.
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
        """Microseconds to read at full bandwidth what a token has to read."""
        return self.read / self.bandwidth * 1e6

    @property
    def share_of_limit(self) -> float:
        """Limit over time."""
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
    subject: BenchmarkModel,
    sparsities: Sequence[float],
    baselines: Sequence[Baseline],
    bandwidth: float,
    progress: Progress = silent,
) -> list[DecodeResult]:
    """Measure our engine, dense first, and baselines, all in turn within each repetition.

    Args:
        subject: The model.
        sparsities: Targets in [0, 1).
        baselines: Other engines with a model of the same shapes.
        bandwidth: Bytes per second that memory can deliver.
        progress: Shows the repetitions going by.

    Returns:
        A result per sparsity, then one per baseline.

    Raises:
        UserError: A decode step is wrong.
    """
    subject.check()
    engines = subject.engines(tuple(dict.fromkeys((0.0, *sparsities))))
    calls: dict[_Runner, Callable[[], float]] = {
        (OURS, sparsity): partial(_decode, subject, engine) for sparsity, engine in engines.items()
    }
    for baseline in baselines:
        calls[baseline.name, 0.0] = partial(
            baseline.time, subject.prompt, subject.workload.new_tokens
        )
    times, starts = _interleaved(subject, calls, progress)
    effective = {
        sparsity: subject.effective_sparsity(engine) for sparsity, engine in engines.items()
    }
    dense = times[OURS, 0.0].median
    return [
        _result(
            subject,
            runner,
            sparsity,
            timing,
            effective[sparsity],
            bandwidth,
            dense,
            starts[runner, sparsity],
        )
        for (runner, sparsity), timing in times.items()
    ]


def _interleaved(
    subject: BenchmarkModel,
    calls: Mapping[_Runner, Callable[[], float]],
    progress: Progress,
) -> tuple[dict[_Runner, Timing], dict[_Runner, Start]]:
    # The first round compiles and captures, at the size of all others.
    rounds = [key for _ in range(subject.workload.repeats + 1) for key in calls]
    times: dict[_Runner, list[float]] = {key: [] for key in calls}
    seconds: dict[_Runner, list[float]] = {key: [] for key in calls}
    memory: dict[_Runner, int | None] = {}
    for key in progress(rounds, f"Decoding {subject.name}"):
        runner, _ = key
        taken = MemoryTaken(subject.device)
        begun = time.perf_counter()
        times[key].append(calls[key]())
        seconds[key].append(time.perf_counter() - begun)
        beyond = taken.beyond(subject.bytes_of_cache()) if runner == OURS else None
        memory.setdefault(key, beyond)
    starts = {
        key: Start(seconds=first - statistics.median(later), bytes=memory[key])
        for key, (first, *later) in seconds.items()
    }
    return {key: summary_of(values[1:]) for key, values in times.items()}, starts


def _decode(subject: BenchmarkModel, engine: Engine) -> float:
    number = subject.workload.new_tokens
    result = engine.generate(subject.prompt, max_new_tokens=number, stop_tokens=())
    return 1e6 / result.tokens_per_second


def _result(
    subject: BenchmarkModel,
    runner: str,
    sparsity: float,
    timing: Timing,
    effective: Mapping[str, float],
    bandwidth: float,
    dense: float,
    start: Start,
) -> DecodeResult:
    is_ours = runner == OURS
    return DecodeResult(
        model=subject.name,
        runner=runner,
        dtype=subject.dtype,
        weights=subject.weights if is_ours else WeightsRead(),
        prompt_tokens=subject.workload.prompt_tokens,
        new_tokens=subject.workload.new_tokens,
        sparsity=sparsity,
        effective_sparsity=subject.mean_sparsity(effective),
        token=timing,
        read=subject.bytes_read(effective) if is_ours else subject.bytes_of_floats(),
        bandwidth=bandwidth,
        speed_up=dense / timing.median,
        start=start,
    )
