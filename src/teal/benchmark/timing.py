"""How long a call takes: on the GPU inside a CUDA graph, on the CPU by the clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]

# A CPU runs other programs too, so that it takes more of them.
_REPEATS = {"cuda": 15, "cpu": 25}
_REPLAY_SECONDS = 2e-3
_MOST_CALLS = 200
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call over repeats, in microseconds.

    Attributes:
        median: Half of the repeats were faster.
        low: One in ten was faster.
        high: One in ten was slower.
    """

    median: float
    low: float
    high: float


def time_call(call: Call, device: torch.device, *, least_calls: int) -> Timing:
    """Measure `call(i)` for i = 0, 1, 2, …, one after the other.

    Args:
        call: Enqueues the work on inputs number i, modulo as many as there are.
        device: Where it runs.
        least_calls: A repeat makes at least this many calls, so that it uses all inputs.

    Returns:
        Time per call over repeats of many calls each.
    """
    for i in range(_WARM_UP):
        call(i)
    if device.type != "cuda":
        return summary_of([_clocked(call, least_calls) for _ in range(_REPEATS["cpu"])])
    calls = max(least_calls, min(_MOST_CALLS, int(_REPLAY_SECONDS * 1e6 / _guess(call))))

    def call_all() -> None:
        for i in range(calls):
            call(i)

    graph = _captured(call_all)
    graph.replay()
    replays = [_between_events(graph.replay) for _ in range(_REPEATS["cuda"])]
    return summary_of([milliseconds * 1e3 / calls for milliseconds in replays])


def time_graph(work: Callable[[], object], replays: int, repeats: int) -> float:
    """Capture `work` in a CUDA graph and measure its replays.

    Args:
        work: Enqueues the work, which has run before.
        replays: One after the other, of a repeat.
        repeats: The fastest of which counts.

    Returns:
        Microseconds.
    """
    graph = _captured(work)

    def replay_all() -> None:
        for _ in range(replays):
            graph.replay()

    times = []
    for _ in range(repeats):
        graph.replay()
        times.append(_between_events(replay_all) * 1e3 / replays)
    return min(times)


def summary_of(times: list[float]) -> Timing:
    """Summarise repeats of one call.

    Args:
        times: Microseconds of every repeat.
    """
    if len(times) == 1:
        return Timing(median=times[0], low=times[0], high=times[0])
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(median=statistics.median(times), low=deciles[0], high=deciles[-1])


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _guess(call: Call) -> float:
    return max(1.0, min(_between_events(lambda: call(0)) for _ in range(_WARM_UP)) * 1e3)


def _between_events(work: Callable[[], object]) -> float:
    begin, end = _event(), _event()
    begin.record()
    work()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _clocked(call: Call, calls: int) -> float:
    begin = time.perf_counter()
    for i in range(calls):
        call(i)
    return (time.perf_counter() - begin) * 1e6 / calls
