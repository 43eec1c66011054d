import gc
import weakref

import pytest
import torch

from teal.engine.cuda_graph import CapturedStep, rows_of
from teal.engine.sampler import Sampler, SamplingForm, SamplingSettings

VOCABULARY = 11
STEPS = 20


class Counting:
    """A model whose likeliest next token is the one after the last, and a sampler on it."""

    def __init__(self, device, *, logprobs=False):
        form = SamplingForm.of(SamplingSettings(), logprobs=logprobs)
        self.sampler = Sampler(form, 2, VOCABULARY, STEPS, device)
        self.steps = 0

    def begin(self):
        self.sampler.begin(SamplingSettings(), [])
        self._choose(torch.tensor([3, 7], device=self.sampler.tokens.device))

    def advance(self):
        self.steps += 1
        self._choose((self.sampler.tokens + 1) % VOCABULARY)

    def _choose(self, tokens):
        self.sampler((torch.arange(VOCABULARY, device=tokens.device) == tokens[:, None]).float())


EXPECTED = [[(3 + step) % VOCABULARY, (7 + step) % VOCABULARY] for step in range(STEPS)]


def test_rows_begin_with_what_was_chosen_before(device):
    model = Counting(device)
    model.begin()
    rows = list(rows_of(model.sampler, model.advance, STEPS))
    assert [tokens for tokens, _ in rows] == EXPECTED
    assert {logprobs for _, logprobs in rows} == {None}


def test_logprobs_come_with_their_tokens(device):
    model = Counting(device, logprobs=True)
    model.begin()
    expected = torch.eye(VOCABULARY).log_softmax(-1).amax().item()
    for _, logprobs in rows_of(model.sampler, model.advance, 3):
        assert logprobs == pytest.approx([expected] * 2)


def test_no_step_is_run_that_is_not_asked_for(device):
    model = Counting(device)
    model.begin()
    list(rows_of(model.sampler, model.advance, 5))
    assert model.steps == 4


def test_on_a_cpu_no_step_is_run_ahead():
    model = Counting(torch.device("cpu"))
    model.begin()
    rows = rows_of(model.sampler, model.advance, STEPS)
    next(rows)
    next(rows)
    assert model.steps == 1


@pytest.mark.gpu
def test_a_captured_step_is_the_step():
    model = Counting(torch.device("cuda"))
    model.begin()
    replay = CapturedStep(model.advance, torch.device("cuda"))
    captured_steps = model.steps
    model.begin()
    rows = list(rows_of(model.sampler, replay, STEPS))
    assert [tokens for tokens, _ in rows] == EXPECTED
    assert model.steps == captured_steps


@pytest.mark.gpu
def test_a_captured_step_keeps_the_memory_that_it_works_on():
    model = Counting(torch.device("cuda"))
    memory = weakref.ref(model)
    replay = CapturedStep(model.advance, torch.device("cuda"))
    del model
    gc.collect()
    assert memory() is not None
    del replay
    gc.collect()
    assert memory() is None


@pytest.mark.gpu
def test_a_few_steps_are_queued_and_the_host_waits_for_nothing_else():
    model = Counting(torch.device("cuda"))
    model.begin()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = rows_of(model.sampler, model.advance, STEPS)
        assert next(rows)[0] == EXPECTED[0]
        assert 1 <= model.steps < STEPS - 1
        assert [tokens for tokens, _ in rows] == EXPECTED[1:]
    finally:
        torch.cuda.set_sync_debug_mode("default")
