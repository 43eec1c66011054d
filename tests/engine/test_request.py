import dataclasses
import time
from typing import Any, get_type_hints

import pytest

from teal.engine.request import GenerationOptions, GenerationSettings, Recorder, Request
from teal.engine.sampler import SamplingForm
from teal.engine.sequence import FinishReason, Sequence, Token
from teal.foundation.errors import UserError
from tests.engine.decoding import decoder_of
from tests.helpers import tiny_model


def test_options_are_the_fields_of_the_settings() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationSettings)}
    assert set(get_type_hints(GenerationOptions)) == fields


def test_request_knows_its_longest_sequence_and_its_form() -> None:
    settings = GenerationSettings(max_new_tokens=4, temperature=1.0, logprobs=True)
    sequences = [Sequence(i, [3] * length, max_new_tokens=4) for i, length in enumerate((2, 5, 1))]
    request = Request(
        decoder=decoder_of(tiny_model("llama")), settings=settings, sequences=sequences
    )
    assert request.max_length == 9
    assert request.form == SamplingForm.of(settings, logprobs=True)
    assert request.form.has_logprobs


def token(sequence: int, id: int, reason: FinishReason | None, logprob: float | None) -> Token:
    return Token(sequence=sequence, id=id, text="x", logprob=logprob, finish_reason=reason)


def test_speed_counts_the_tokens_after_the_first() -> None:
    recorder = Recorder(2)
    for step in range(3):
        for sequence in range(2):
            time.sleep(0.01)
            recorder.add(token(sequence, step, "length" if step == 2 else None, -0.5))
    result = recorder.result()
    assert result.tokens == ((0, 1, 2), (0, 1, 2))
    assert result.texts == ("xxx", "xxx")
    assert result.logprobs == ((-0.5,) * 3,) * 2
    assert result.finish_reasons == ("length", "length")
    assert 0.02 <= result.prefill_seconds < result.decode_seconds
    assert result.tokens_per_second == 4 / result.decode_seconds


def test_single_token_has_no_speed() -> None:
    recorder = Recorder(1)
    recorder.add(token(0, 1, "length", None))
    assert recorder.result().tokens_per_second == 0.0
    assert recorder.result().logprobs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is below 1"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": ["x", ""]}, "stop string is empty"),
        ({"temperature": -1.0}, "temperature"),
    ],
    ids=["no tokens", "empty stop", "one empty stop", "temperature"],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerationSettings(**options)
