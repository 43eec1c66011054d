from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teal.models.loading import load_model, load_tokenizer
from teal.sparsification import sparsify
from tests.engine.decoding import by_transformers, cache_for, decoded, decoder_of, plan_at
from tests.helpers import TOLERANCES

TRAINED = Path(__file__).parents[2] / "models/py-16m"
# The trained model continues this with confidence.
TEXT = """import os
import sys


class Reader:
    def __init__(self, path):
        self.path = path

    def read(self):
        return open(self.path).read()


class Writer:
    def __init__(self, path):
"""


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.tensor(load_tokenizer(str(TRAINED))(TEXT).input_ids)


# With these thresholds the best token always leads by 0.4 or more, so that an activation just at a
# threshold, which a rounding error may keep or drop, does not change the text.
@pytest.mark.parametrize("sparsity", [0.0, 0.3], ids=["dense", "sparse"])
def test_greedy_tokens_of_the_trained_model_equal_those_of_transformers(
    text: Tensor, sparsity: float
) -> None:
    model, new_tokens = load_model(str(TRAINED), dtype="float32", device="cpu"), 40
    plan = plan_at(decoder_of(model), text, sparsity)
    sparsify(model, plan)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    expected = model.generate(text[None], **options)[0, len(text) :]

    decoder = decoder_of(model, plan)
    cache = cache_for(decoder, capacity=len(text) + new_tokens)
    logits, tokens = decoder.prefill(text, cache)[None], list[int]()
    for _ in range(new_tokens):
        # As with `min_new_tokens`, the text does not end.
        ends = torch.arange(logits.shape[-1]) == model.config.eos_token_id
        tokens.append(int(logits.masked_fill(ends, -torch.inf).argmax()))
        logits = decoder.step(torch.tensor(tokens[-1:]), cache)
    assert tokens == expected.tolist()


@pytest.mark.parametrize("sparsity", [0.0, 0.3], ids=["dense", "sparse"])
def test_bfloat16_of_the_trained_model_is_as_accurate_as_that_of_transformers(
    text: Tensor, sparsity: float
) -> None:
    exact, rounded = (
        load_model(str(TRAINED), dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")
    )
    plan = plan_at(decoder_of(exact), text, sparsity)
    expected = by_transformers(exact, text, plan)
    by_torch = divergence(expected, by_transformers(rounded, text, plan))
    allowed = TOLERANCES["product_factor"] * by_torch
    assert divergence(expected, decoded(decoder_of(rounded, plan), text)) <= allowed


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Return the mean KL divergence of the predictions from the expected ones."""
    known, found = (given.float().log_softmax(-1) for given in (expected, logits))
    return float(F.kl_div(found, known, log_target=True, reduction="batchmean"))
