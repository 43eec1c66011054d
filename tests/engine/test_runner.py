import gc
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from teal.engine import runner as runner_module
from teal.engine.decoder import Decoder
from teal.engine.kv_cache import KeyValueCache
from teal.engine.request import GenerationSettings, Request
from teal.engine.runner import CapturedStep, Runner
from teal.engine.sampler import NONFINITE, Sampler, SamplingForm, SamplingSettings
from teal.engine.sequence import Sequence as GeneratedSequence
from teal.engine.sequence import Token
from teal.engine.weights.loader import OpenedModel, open_model
from teal.foundation.errors import UserError
from tests.helpers import VOCABULARY, tiny_model

SETTINGS = GenerationSettings(max_new_tokens=6)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
STEPS = 20


class CountingDecoder(Decoder):
    """A model whose next token is always the one after the last; it counts its steps."""

    steps = 0
    broken_step: int | None = None

    def prefill(self, tokens: Tensor, cache: KeyValueCache, index: int = 0) -> Tensor:
        cache.positions[index] = len(tokens)
        return self._logits_after(tokens[-1:].to(cache.positions.device))[0]

    def step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        self.steps += 1
        cache.positions += 1
        logits = self._logits_after(tokens)
        if self.steps == self.broken_step:
            logits[1] = torch.nan
        return logits

    def _logits_after(self, tokens: Tensor) -> Tensor:
        vocabulary = torch.arange(VOCABULARY, device=tokens.device)
        return (vocabulary == (tokens[:, None] + 1) % VOCABULARY).float()


@pytest.fixture
def opened(device: torch.device) -> OpenedModel:
    return open_model(tiny_model("llama").to(device))


def runner_of(opened: OpenedModel, capacity: int = 32) -> Runner:
    return Runner(opened.architecture, opened.weights, 2, capacity)


def counting(opened: OpenedModel) -> CountingDecoder:
    return CountingDecoder(opened.architecture, opened.weights)


def request_of(
    decoder: Decoder,
    settings: GenerationSettings = SETTINGS,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    stop_tokens: Sequence[int] = (),
) -> Request:
    sequences = [
        GeneratedSequence(
            index,
            prompt,
            max_new_tokens=settings.max_new_tokens,
            stop_tokens=frozenset(stop_tokens),
        )
        for index, prompt in enumerate(prompts)
    ]
    return Request(decoder=decoder, settings=settings, sequences=sequences)


def run(runner: Runner, request: Request) -> Iterator[Token]:
    runner.prepare(request)
    return runner.run(request)


def ids(tokens: Iterator[Token]) -> list[list[int]]:
    """Return the token ids of each sequence."""
    found: list[list[int]] = [[], []]
    for token in tokens:
        found[token.sequence].append(token.id)
    return found


def test_tokens_of_a_step_come_in_the_order_of_their_sequences(opened: OpenedModel) -> None:
    tokens = list(run(runner_of(opened), request_of(counting(opened))))
    assert [token.sequence for token in tokens] == [0, 1] * 6
    assert [token.id for token in tokens[::2]] == list(range(8, 14))
    assert [token.id for token in tokens[1::2]] == list(range(12, 18))
    assert [token.finish_reason for token in tokens] == [None] * 10 + ["length"] * 2
    assert {token.logprob for token in tokens} == {None}


def test_logprobs_come_with_their_tokens(opened: OpenedModel) -> None:
    settings = GenerationSettings(max_new_tokens=3, logprobs=True)
    tokens = run(runner_of(opened), request_of(counting(opened), settings))
    expected = torch.eye(VOCABULARY).log_softmax(-1).amax().item()
    assert [token.logprob for token in tokens] == pytest.approx([expected] * 6)


def test_sequences_end_independently(opened: OpenedModel) -> None:
    request = request_of(counting(opened), stop_tokens=[9, 16])
    assert ids(run(runner_of(opened), request)) == [[8, 9], [12, 13, 14, 15, 16]]
    assert [sequence.finish_reason for sequence in request.sequences] == ["stop", "stop"]


def test_cpu_runs_no_step_ahead_and_none_after_the_end() -> None:
    opened = open_model(tiny_model("llama"))
    decoder = counting(opened)
    tokens = run(runner_of(opened), request_of(decoder, stop_tokens=[11, 15]))
    for _ in range(3):
        next(tokens)
    assert decoder.steps == 1
    list(tokens)
    assert decoder.steps == 3


def test_steps_run_ahead_are_as_many_as_allowed_and_change_no_token() -> None:
    opened = open_model(tiny_model("llama"))
    decoder, runner = counting(opened), runner_of(opened)
    runner._ahead = 2
    request = request_of(decoder)
    tokens = run(runner, request)
    first = [next(tokens) for _ in range(3)]
    # The third token belongs to the second step.
    assert decoder.steps == 1 + 2
    rest = list(tokens)
    assert [token.id for token in (*first, *rest)][::2] == list(range(8, 14))
    assert decoder.steps == SETTINGS.max_new_tokens - 1


def test_no_step_is_run_for_the_last_token() -> None:
    opened = open_model(tiny_model("llama"))
    decoder = counting(opened)
    list(run(runner_of(opened), request_of(decoder)))
    assert decoder.steps == SETTINGS.max_new_tokens - 1


def test_nonfinite_logits_are_an_error_before_any_token_of_their_step() -> None:
    opened = open_model(tiny_model("llama"))
    decoder = counting(opened)
    decoder.broken_step = 2
    tokens = run(runner_of(opened), request_of(decoder))
    assert [next(tokens).id for _ in range(4)] == [8, 12, 9, 13]
    with pytest.raises(UserError, match=r"NaN or infinity; .*, in float32\. Use bfloat16"):
        next(tokens)


def test_nonfinite_logits_of_an_ended_sequence_are_ignored() -> None:
    opened = open_model(tiny_model("llama"))
    decoder = counting(opened)
    decoder.broken_step = 2
    request = request_of(decoder, stop_tokens=[13])
    assert ids(run(runner_of(opened), request)) == [list(range(8, 14)), [12, 13]]


def test_reused_runner_gives_the_same_tokens(opened: OpenedModel) -> None:
    runner = runner_of(opened, 16)
    decoder = Decoder(opened.architecture, opened.weights)
    first = ids(run(runner, request_of(decoder)))
    sampled = GenerationSettings(max_new_tokens=6, temperature=1.0, repetition_penalty=1.3)
    ids(run(runner, request_of(decoder, sampled, PROMPTS[::-1])))
    assert ids(run(runner, request_of(decoder))) == first


def test_runner_fits_its_batch_size_and_up_to_its_capacity(opened: OpenedModel) -> None:
    runner, decoder = runner_of(opened, 10), Decoder(opened.architecture, opened.weights)
    assert runner.fits(request_of(decoder))
    assert not runner.fits(request_of(decoder, GenerationSettings(max_new_tokens=7)))
    assert not runner.fits(request_of(decoder, prompts=PROMPTS[:1]))


def test_number_of_kept_steps_is_bounded(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_STEPS", 2)
    runner = runner_of(opened, 16)
    decoders = [Decoder(opened.architecture, opened.weights) for _ in range(3)]
    results = [ids(run(runner, request_of(decoder))) for decoder in (*decoders, decoders[0])]
    assert results == [results[0]] * 4
    assert len(runner._steps) == 2


@pytest.mark.gpu
def test_gpu_runs_a_few_steps_ahead_and_the_host_waits_for_nothing_else() -> None:
    opened = open_model(tiny_model("llama").cuda())
    runner = runner_of(opened)
    request = request_of(counting(opened), GenerationSettings(max_new_tokens=STEPS))
    tokens = run(runner, request)
    # The prefill may wait.
    assert next(tokens).id == 8
    queued = runner._cache.lengths[0] - len(PROMPTS[0])
    assert queued == runner_module._AHEAD
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = ids(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rest == [[9 + step for step in range(STEPS - 1)], [12 + step for step in range(STEPS)]]
    assert runner._cache.lengths[0] == len(PROMPTS[0]) + STEPS - 1


@pytest.mark.gpu
def test_closing_early_leaves_the_runner_ready_for_the_next_request() -> None:
    opened = open_model(tiny_model("llama").cuda())
    runner, decoder = runner_of(opened), counting(opened)
    tokens = run(runner, request_of(decoder, GenerationSettings(max_new_tokens=STEPS)))
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert ids(run(runner, request_of(decoder)))[0] == list(range(8, 14))


class CountingStep:
    """A step that adds one to each of two token ids, and a sampler behind it."""

    def __init__(self) -> None:
        form = SamplingForm.of(SamplingSettings(), logprobs=False)
        self.sampler = Sampler(form, 2, VOCABULARY, STEPS, torch.device("cuda"))
        self.calls = 0

    def begin(self) -> None:
        self.sampler.begin(SamplingSettings(), [])
        self.sampler.tokens.copy_(torch.tensor([3, 7]))

    def __call__(self) -> None:
        self.calls += 1
        vocabulary = torch.arange(VOCABULARY, device="cuda")
        self.sampler((vocabulary == self.sampler.tokens[:, None] + 1).float())


@pytest.mark.gpu
def test_captured_step_replays_the_step_without_calling_it() -> None:
    step = CountingStep()
    step.begin()
    replay = CapturedStep(step, torch.device("cuda"))
    calls = step.calls
    step.begin()
    for _ in range(STEPS):
        replay()
    expected = [[4 + index, 8 + index] for index in range(STEPS)]
    assert step.sampler.history.tolist() == expected
    assert NONFINITE not in step.sampler.history
    assert step.calls == calls


@pytest.mark.gpu
def test_captured_step_keeps_the_memory_that_it_works_on() -> None:
    step = CountingStep()
    memory = weakref.ref(step)
    replay = CapturedStep(step, torch.device("cuda"))
    del step
    gc.collect()
    assert memory() is not None
    del replay
    gc.collect()
    assert memory() is None
