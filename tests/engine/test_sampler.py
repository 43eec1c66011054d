import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from teal.engine.sampler import NONFINITE, Sampler, SamplingForm, SamplingSettings
from teal.foundation.errors import UserError

VOCABULARY = 200
STEPS = 3000


def draw(
    logits: Tensor,
    *,
    steps: int = STEPS,
    prompts: list[Tensor] | None = None,
    logprobs: bool = False,
    device: torch.device | str = "cpu",
    **values: Any,
) -> Sampler:
    """Choose `steps` times from the same logits."""
    settings = SamplingSettings(**values)
    form = SamplingForm.of(settings, logprobs=logprobs)
    logits = logits.to(device)
    sampler = Sampler(form, len(logits), logits.shape[1], steps, logits.device)
    prompts = prompts or [torch.zeros(0, dtype=torch.int64)] * len(logits)
    sampler.begin(settings, [prompt.to(device) for prompt in prompts])
    for _ in range(steps):
        sampler(logits)
    if logits.is_cuda:
        # The history may be in host memory.
        torch.cuda.synchronize()
    return sampler


@pytest.fixture
def logits() -> Tensor:
    return 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))


def by_transformers(logits: Tensor, values: dict[str, float]) -> Tensor:
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    chain = LogitsProcessorList([warp(values[name]) for name, warp in warpers.items()
                                 if name in values])  # fmt: skip
    return chain(torch.zeros(1, 1, dtype=torch.int64), logits).softmax(-1)[0]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda values: ", ".join(values),
)
def test_frequencies_match_the_probabilities_of_transformers(
    logits: Tensor, values: dict[str, Any], device: torch.device
) -> None:
    expected = by_transformers(logits, values)
    counts = draw(logits, **values, device=device).history.cpu().flatten().bincount(
        minlength=VOCABULARY
    )  # fmt: skip
    assert not counts[expected == 0].any()
    deviation = (counts - STEPS * expected).abs() / (STEPS * expected).sqrt().clamp(min=1)
    assert deviation.max() < 5


def test_temperature_zero_takes_the_likeliest_token(logits: Tensor, device: torch.device) -> None:
    sampler = draw(logits, steps=2, top_k=3, top_p=0.1, device=device)
    assert sampler.history.flatten().tolist() == [int(logits.argmax())] * 2


def test_first_of_equal_logits_is_taken(device: torch.device) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[1, [7, 150]] = 1.0
    assert draw(logits, steps=1, device=device).tokens.tolist() == [0, 7]


def test_penalty_equals_that_of_transformers_for_prompt_and_continuation(
    logits: Tensor, device: torch.device
) -> None:
    prompts = [torch.tensor([int(logits.argmax()), 3, 3])]
    chosen = draw(logits, steps=6, prompts=prompts, repetition_penalty=1.5, device=device)
    ids, penalise = prompts[0][None], RepetitionPenaltyLogitsProcessor(1.5)
    for _ in range(6):
        best = penalise(ids, logits.clone()).argmax(-1)
        ids = torch.cat([ids, best[None]], dim=1)
    assert chosen.history.flatten().tolist() == ids[0, 3:].tolist()


def test_equal_seeds_give_equal_tokens_and_others_differ(
    logits: Tensor, device: torch.device
) -> None:
    first, again, other = (
        draw(logits, steps=30, temperature=1.0, seed=seed, device=device).history
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.gpu
def test_seed_means_the_same_on_every_device(logits: Tensor) -> None:
    values = {"temperature": 1.0, "top_p": 0.9, "steps": 50}
    on_gpu = draw(logits, **values, device="cuda").history.cpu()
    assert torch.equal(on_gpu, draw(logits, **values).history)


def test_sequence_draws_the_same_tokens_in_a_batch_as_alone(logits: Tensor) -> None:
    together = draw(logits.expand(3, -1), steps=20, temperature=1.0, seed=4).history
    alone = draw(logits, steps=20, temperature=1.0, seed=6).history
    assert torch.equal(together[:, 2:], alone)


def test_logprobs_are_those_of_the_unchanged_logits(logits: Tensor) -> None:
    sampler = draw(logits, steps=4, temperature=0.5, repetition_penalty=2.0, logprobs=True)
    expected = logits.log_softmax(-1)[0, sampler.history.flatten()]
    assert torch.equal(sampler.logprobs.flatten(), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_logits_give_no_token(
    logits: Tensor, temperature: float, value: float, device: torch.device
) -> None:
    both = torch.cat([logits, logits])
    both[1, 17] = value
    sampler = draw(both, steps=1, temperature=temperature, top_p=0.9, device=device)
    assert sampler.history[0, 0] != NONFINITE
    assert sampler.history[0, 1] == NONFINITE
    # The next step still reads a valid token id.
    assert 0 <= sampler.tokens[1] < VOCABULARY


@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.5}, {"logprobs": True}],
    ids=lambda values: ", ".join(values) or "greedy",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_16_bit_dtypes_are_processed_in_float32(
    logits: Tensor, dtype: torch.dtype, values: dict[str, Any], device: torch.device
) -> None:
    short = logits.to(dtype)
    found, expected = (
        draw(given, steps=20, device=device, **values) for given in (short, short.float())
    )
    assert torch.equal(found.history, expected.history)
    assert torch.equal(found.logprobs, expected.logprobs)


def test_tiny_temperature_counts_as_zero(logits: Tensor) -> None:
    tokens = draw(logits, steps=5, temperature=1e-4).history
    assert (tokens == logits.argmax()).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name} .* out of range\. Give"):
        SamplingSettings(**{name: value})
