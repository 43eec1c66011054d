"""Steps one after the other: captured and queued ahead on a GPU, a plain loop elsewhere."""

from collections.abc import Callable, Iterator

import torch

from teal.engine.sampler import Sampler

Advance = Callable[[], None]
# Token ids of all streams, and the logarithms of their probabilities where they are recorded.
Row = tuple[list[int], list[float] | None]

# Steps that wait on the GPU behind the one whose tokens the host is waiting for: enough that the
# GPU never waits for the host, few enough that little is thrown away after a stop.
_AHEAD = 4
_WARM_UP = 2


class CapturedStep:
    """One step captured in a CUDA graph; a call replays it.

    The step is run before, to compile kernels and to fill caches of libraries: whoever owns its
    state resets that afterwards.

    Args:
        advance: Enqueues the work of a step on the current stream, always on the same memory.
        device: The CUDA device.
    """

    def __init__(self, advance: Advance, device: torch.device) -> None:
        # The graph knows addresses only: this keeps alive what they belong to.
        self._advance = advance
        self._device = device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    advance()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                advance()

    def __call__(self) -> None:
        """Enqueue the step."""
        with torch.cuda.device(self._device):
            self._graph.replay()


def rows_of(sampler: Sampler, advance: Advance, steps: int) -> Iterator[Row]:
    """Yield what `sampler` chooses, first of all what it has chosen already.

    Args:
        sampler: Has chosen the first tokens.
        advance: Runs a step of the model and the sampler.
        steps: Rows to yield at most.
    """
    if sampler.tokens.is_cuda:
        return _queued(sampler, advance, steps)
    return _plain(sampler, advance, steps)


def _plain(sampler: Sampler, advance: Advance, steps: int) -> Iterator[Row]:
    for step in range(steps):
        if step:
            advance()
        yield _row(sampler.history[step], sampler.logprobs[step], sampler)


def _queued(sampler: Sampler, advance: Advance, steps: int) -> Iterator[Row]:
    """Queue steps ahead; their rows go through pinned memory, each with an event behind it."""
    is_on_host = not sampler.history.is_cuda
    tokens = sampler.history[:steps]
    if not is_on_host:
        tokens = torch.empty_like(tokens, device="cpu", pin_memory=True)
    logprobs = torch.empty_like(sampler.logprobs[:steps], device="cpu", pin_memory=True)
    arrived: list[torch.cuda.Event] = []
    try:
        for step in range(steps):
            while len(arrived) < min(steps, step + 1 + _AHEAD):
                sent = len(arrived)
                if sent:
                    advance()
                if not is_on_host:
                    tokens[sent].copy_(sampler.history[sent], non_blocking=True)
                if sampler.form.has_logprobs:
                    logprobs[sent].copy_(sampler.logprobs[sent], non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(sampler.tokens.device))
                arrived.append(event)
            arrived[step].synchronize()
            yield _row(tokens[step], logprobs[step], sampler)
    finally:
        # torch does not know that steps still queued write to this memory of the host.
        if is_on_host and arrived:
            arrived[-1].synchronize()


def _row(tokens: torch.Tensor, logprobs: torch.Tensor, sampler: Sampler) -> Row:
    return tokens.tolist(), logprobs.tolist() if sampler.form.has_logprobs else None
