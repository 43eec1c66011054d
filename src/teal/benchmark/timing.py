"""Times calls, in a CUDA graph on a GPU and by the clock on a CPU, and memory bandwidth."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[int], object]

# A CPU also runs other programs, so its times vary more.
_REPEATS = {"cuda": 15, "cpu": 25}
_REPLAY_SECONDS = 2e-3
_MOST_CALLS = 200
_WARM_UP = 3
# Read to measure bandwidth: more than any cache holds.
_BANDWIDTH_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call over repeats, in microseconds.

    Attributes:
        median: Median of the repeats.
        low: 10 % quantile.
        high: 90 % quantile.
    """

    median: float
    low: float
    high: float


def time_call(call: Call, device: torch.device, *, least_calls: int) -> Timing:
    """Time `call(i)` for i = 0, 1, 2, …, one after the other.

    Args:
        call: Enqueues the work on input number i, modulo the number of inputs.
        device: Device that it runs on.
        least_calls: Calls per repeat at least, so that every input is used.

    Returns:
        Time per call; each repeat is the mean of many calls.
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
    """Capture `work` in a CUDA graph and time its replays.

    Args:
        work: Enqueues the work; it has run before.
        replays: Replays per repeat.
        repeats: Repeats, of which the fastest counts.

    Returns:
        Microseconds per replay.
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


def read_bandwidth(device: torch.device) -> float:
    """Measure how fast a plain sum over a large array reads memory: the limit of one-row products.

    Args:
        device: Device whose memory is read.

    Returns:
        Bytes per second.
    """
    halves = torch.ones(2, _BANDWIDTH_BYTES[device.type] // 4, dtype=torch.float32, device=device)

    def read(i: int) -> Tensor:
        return halves[i % 2].sum()

    timing = time_call(read, device, least_calls=2)
    return halves[0].nbytes / (timing.median * 1e-6)


def summary_of(times: list[float]) -> Timing:
    """Summarise repeats of one call.

    Args:
        times: Microseconds, one entry per repeat.
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
