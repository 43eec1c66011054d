"""The decode loop, and the memory and captured CUDA graphs that it runs on."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from teal.engine.decoder import Decoder
from teal.engine.fused_step import stepper_of
from teal.engine.kv_cache import KeyValueCache
from teal.engine.request import Request
from teal.engine.sampler import NONFINITE, Sampler, SamplingForm
from teal.engine.sequence import Token
from teal.engine.weights.decoder_weights import DecoderWeights
from teal.foundation.errors import UserError
from teal.models.architectures import Architecture

try:
    from teal.kernels.cpu.threads import FreeCores
except ImportError:
    FreeCores = None  # type: ignore[assignment, misc]

Advance = Callable[[], None]

# Steps queued on the GPU behind the one whose tokens the host waits for: enough that the GPU never
# waits for the host, few enough that little work is thrown away after a stop.
_AHEAD = 4
# Captured graphs that are kept; each holds the memory of a step.
_STEPS = 8
_WARM_UP = 2


class Runner:
    """Runs requests on one cache, with samplers and steps that later requests use again.

    Args:
        architecture: Architecture of the model.
        weights: Weights of the model.
        batch_size: Number of sequences of every request.
        capacity: Tokens of prompt and continuation that each sequence can hold.

    Raises:
        UserError: The cache does not fit into memory.
    """

    def __init__(
        self, architecture: Architecture, weights: DecoderWeights, batch_size: int, capacity: int
    ) -> None:
        self._vocab_size = architecture.vocab_size
        self._dtype = weights.dtype
        self._device = weights.device
        self._ahead = _AHEAD if weights.device.type == "cuda" else 0
        self._cache = KeyValueCache(
            architecture, batch_size, capacity, weights.dtype, weights.device
        )
        self._cores = None
        if weights.device.type == "cpu" and FreeCores is not None:
            self._cores = FreeCores()
        self._samplers: dict[SamplingForm, Sampler] = {}
        self._steps: dict[tuple[Decoder, SamplingForm], Advance] = {}

    def fits(self, request: Request) -> bool:
        """Tell whether the cache has the batch size of a request and room for its tokens."""
        is_same_size = self._cache.batch_size == len(request.sequences)
        return is_same_size and self._cache.capacity >= request.max_length

    @torch.inference_mode()
    def prepare(self, request: Request) -> None:
        """Make the step of a request, unless an earlier one made it; on a GPU, capture it.

        Capturing leaves the cache and the sampler undefined.
        """
        key = (request.decoder, request.form)
        if key in self._steps:
            return
        while len(self._steps) >= _STEPS:
            del self._steps[next(iter(self._steps))]
        # Not self: memory of this size should not wait for the garbage collector.
        sampler, cache, cores = self._sampler(request.form), self._cache, self._cores
        step = stepper_of(request.decoder, cache)

        def advance() -> None:
            with nullcontext() if cores is None else cores.step():
                sampler(step(sampler.tokens, cache))

        if self._device.type == "cuda":
            cache.reset()
            sampler.begin(request.settings, [])
            self._steps[key] = CapturedStep(advance, self._device)
        else:
            self._steps[key] = advance

    @torch.inference_mode()
    def run(self, request: Request) -> Iterator[Token]:
        """Prefill the prompts, then decode until all sequences have finished.

        Args:
            request: A request that `prepare` was called with.

        Yields:
            Tokens; those of one step in the order of their sequences.

        Raises:
            UserError: A prompt has ids outside the vocabulary, or the logits hold NaN or infinity.
        """
        sampler = self._sampler(request.form)
        advance = self._steps[request.decoder, request.form]
        self._prefill(request, sampler)
        steps = request.settings.max_new_tokens
        results = _StepResults(sampler, steps)
        try:
            for step in range(steps):
                while results.sent < min(steps, step + 1 + self._ahead):
                    # The prefill has chosen the first tokens.
                    if results.sent:
                        advance()
                    results.send()
                tokens, logprobs = results.receive(step)
                self._require_finite(request, step, tokens)
                for index, sequence in enumerate(request.sequences):
                    if sequence.finish_reason is None:
                        yield sequence.take(tokens[index], logprobs[index] if logprobs else None)
                if all(sequence.finish_reason for sequence in request.sequences):
                    return
        finally:
            results.close()

    def _prefill(self, request: Request, sampler: Sampler) -> None:
        prompts = self._prompts(request)
        self._cache.reset()
        sampler.begin(request.settings, prompts)
        logits = [
            request.decoder.prefill(prompt, self._cache, index)
            for index, prompt in enumerate(prompts)
        ]
        sampler(torch.stack(logits))

    def _prompts(self, request: Request) -> list[Tensor]:
        return [
            torch.tensor(sequence.prompt, device=self._device) for sequence in request.sequences
        ]

    def _require_finite(self, request: Request, step: int, tokens: list[int]) -> None:
        is_broken = any(
            token == NONFINITE and sequence.finish_reason is None
            for token, sequence in zip(tokens, request.sequences, strict=True)
        )
        if is_broken:
            layer = self._first_nonfinite_layer(request, step)
            raise _not_finite(layer, self._dtype)

    def _first_nonfinite_layer(self, request: Request, step: int) -> str | None:
        """Repeat the pass behind the tokens of a step and name the first layer with NaN or inf."""
        decoder, cache, prompts = request.decoder, self._cache, self._prompts(request)
        if step == 0:
            cache.reset()
            passes = [
                partial(decoder.prefill, prompt, cache, index)
                for index, prompt in enumerate(prompts)
            ]
        else:
            lengths = [len(prompt) + step - 1 for prompt in prompts]
            cache.positions.copy_(torch.tensor(lengths))
            latest = self._sampler(request.form).history[step - 1]
            passes = [partial(decoder.step, latest.to(self._device).clamp(min=0), cache)]
        names = (decoder.first_nonfinite_layer(run) for run in passes)
        return next((name for name in names if name), None)

    def _sampler(self, form: SamplingForm) -> Sampler:
        if form not in self._samplers:
            self._samplers[form] = Sampler(
                form, self._cache.batch_size, self._vocab_size, self._cache.capacity, self._device
            )
        return self._samplers[form]


class CapturedStep:
    """A step captured in a CUDA graph; a call replays it.

    The step runs a few times before, to compile kernels and to fill the caches of libraries; the
    owner of its state resets that afterwards.

    Args:
        advance: Enqueues the work of a step on the current stream, always on the same memory.
        device: The CUDA device.
    """

    def __init__(self, advance: Advance, device: torch.device) -> None:
        # The graph knows addresses only: this keeps the tensors behind them alive.
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


class _StepResults:
    """Carries the tokens and log-probabilities of each step to the host.

    On a GPU they go through pinned memory with an event behind each step, so that the host can
    read one step while later ones are queued.

    Args:
        sampler: Sampler that has chosen the first tokens.
        steps: Largest number of steps.

    Attributes:
        sent: Number of steps sent so far.
    """

    def __init__(self, sampler: Sampler, steps: int) -> None:
        self._sampler = sampler
        self._tokens, self._logprobs = sampler.history[:steps], sampler.logprobs[:steps]
        if sampler.history.is_cuda:
            self._tokens = torch.empty_like(self._tokens, device="cpu", pin_memory=True)
        if sampler.logprobs.is_cuda:
            self._logprobs = torch.empty_like(self._logprobs, device="cpu", pin_memory=True)
        self._events: list[torch.cuda.Event] = []
        self.sent = 0

    def send(self) -> None:
        """Enqueue the copy of the results of the next step, which itself has been enqueued."""
        sampler, step = self._sampler, self.sent
        self.sent += 1
        if not sampler.tokens.is_cuda:
            return
        if sampler.history.is_cuda:
            self._tokens[step].copy_(sampler.history[step], non_blocking=True)
        if sampler.form.has_logprobs:
            self._logprobs[step].copy_(sampler.logprobs[step], non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(sampler.tokens.device))
        self._events.append(event)

    def receive(self, step: int) -> tuple[list[int], list[float] | None]:
        """Wait for a step and return its token ids and, if recorded, their log-probabilities."""
        if self._events:
            self._events[step].synchronize()
        has_logprobs = self._sampler.form.has_logprobs
        return self._tokens[step].tolist(), self._logprobs[step].tolist() if has_logprobs else None

    def close(self) -> None:
        """Wait for queued steps that write to host memory, of which torch does not know."""
        if self._events and not self._sampler.history.is_cuda:
            self._events[-1].synchronize()


def _not_finite(layer: str | None, dtype: torch.dtype) -> UserError:
    place = f"{layer} is the first to give NaN or infinity" if layer else "all layers are finite"
    return UserError(
        f"The logits hold NaN or infinity; {place}, in {str(dtype).removeprefix('torch.')}. "
        "Use bfloat16 or float32, or check the weights."
    )
