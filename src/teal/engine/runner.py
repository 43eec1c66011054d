"""The memory of a number of streams, and the steps that run on it."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from teal.engine.cuda_graph import Advance, CapturedStep, Row, rows_of
from teal.engine.decoder import Decoder
from teal.engine.fused_step import stepper_of
from teal.engine.kv_cache import KeyValueCache
from teal.engine.request import GenerationSettings
from teal.engine.sampler import Sampler, SamplingForm
from teal.engine.weights.decoder_weights import DecoderWeights
from teal.models.architectures import Architecture

# Captured graphs that are kept; each holds the memory of a step.
_STEPS = 8


class Session:
    """Cache, samplers and captured steps of a fixed number of streams; used again by later calls.

    Args:
        architecture: Of the model.
        weights: Of the model.
        rows: Number of streams.
        capacity: Tokens of prompt and continuation that each can hold.

    Raises:
        UserError: The cache does not fit into memory.
    """

    def __init__(
        self, architecture: Architecture, weights: DecoderWeights, rows: int, capacity: int
    ) -> None:
        self._vocab_size = architecture.vocab_size
        self._device = weights.device
        self._cache = KeyValueCache(
            architecture, rows, capacity, weights.embedding.dtype, weights.device
        )
        self._samplers: dict[SamplingForm, Sampler] = {}
        self._steps: dict[tuple[Decoder, SamplingForm], Advance] = {}

    def fits(self, rows: int, capacity: int) -> bool:
        """Tell whether the session serves so many streams of so many tokens."""
        return self._cache.rows == rows and self._cache.capacity >= capacity

    def prepare(self, decoder: Decoder, settings: GenerationSettings) -> None:
        """Make the step of a decoder, which on a GPU captures it; its memory is then undefined."""
        form = _form(settings)
        if (decoder, form) in self._steps:
            return
        while len(self._steps) >= _STEPS:
            del self._steps[next(iter(self._steps))]
        # Not self: memory of this size should not wait for the garbage collector.
        sampler, cache = self._sampler(form), self._cache
        step = stepper_of(decoder, cache)

        def advance() -> None:
            sampler(step(sampler.tokens, cache))

        if self._device.type == "cuda":
            self._cache.reset()
            sampler.begin(settings, [])
            self._steps[decoder, form] = CapturedStep(advance, self._device)
        else:
            self._steps[decoder, form] = advance

    @torch.inference_mode()
    def rows(
        self, decoder: Decoder, settings: GenerationSettings, prompts: Sequence[Sequence[int]]
    ) -> Iterator[Row]:
        """Run prompts and yield the tokens of all streams, step by step.

        Args:
            decoder: What `prepare` was given.
            settings: What `prepare` was given.
            prompts: One per stream.
        """
        form = _form(settings)
        sampler = self._sampler(form)
        ids = [torch.tensor(prompt, device=self._device) for prompt in prompts]
        self._cache.reset()
        sampler.begin(settings, ids)
        logits = [decoder.prefill(prompt, self._cache, row) for row, prompt in enumerate(ids)]
        sampler(torch.stack(logits))
        yield from rows_of(sampler, self._steps[decoder, form], settings.max_new_tokens)

    @torch.inference_mode()
    def first_nonfinite_layer(
        self,
        decoder: Decoder,
        settings: GenerationSettings,
        prompts: Sequence[Sequence[int]],
        step: int,
    ) -> str | None:
        """Repeat what led to a row of `rows` and name the first layer that gave NaN or infinity.

        Args:
            decoder: As in `rows`.
            settings: As in `rows`.
            prompts: As in `rows`.
            step: Which row it was.
        """
        ids = [torch.tensor(prompt, device=self._device) for prompt in prompts]
        if step == 0:
            self._cache.reset()
            passes = [
                partial(decoder.prefill, ids[row], self._cache, row) for row in range(len(ids))
            ]
        else:
            lengths = [len(prompt) + step - 1 for prompt in prompts]
            self._cache.positions.copy_(torch.tensor(lengths))
            tokens = self._sampler(_form(settings)).history[step - 1].to(self._device).clamp(min=0)
            passes = [partial(decoder.step, tokens, self._cache)]
        names = (decoder.first_nonfinite_layer(run) for run in passes)
        return next((name for name in names if name), None)

    def _sampler(self, form: SamplingForm) -> Sampler:
        if form not in self._samplers:
            self._samplers[form] = Sampler(
                form, self._cache.rows, self._vocab_size, self._cache.capacity, self._device
            )
        return self._samplers[form]


def _form(settings: GenerationSettings) -> SamplingForm:
    return SamplingForm.of(settings, logprobs=settings.logprobs)
