import dataclasses
import time
from typing import get_type_hints

import pytest

from teal.engine.request import (
    GenerationOptions,
    GenerationSettings,
    Recorder,
    Stream,
    Token,
    follow,
)
from teal.foundation.errors import UserError


class Letters:
    """A tokenizer whose token 0 is "a", 1 "b" and so on."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(97 + token) for token in token_ids)


def continued(rows, *, stop_tokens=(), tokenizer=None, **settings):
    """Follow one stream through rows of one token each."""
    given = GenerationSettings(**settings)
    stream = Stream(0, [0], given, frozenset(stop_tokens), tokenizer or Letters())
    return list(follow((([token], None) for token in rows), [stream]))


def summary(tokens):
    return "".join(token.text for token in tokens), tokens[-1].finish_reason


def test_options_are_the_fields_of_the_settings():
    fields = {field.name for field in dataclasses.fields(GenerationSettings)}
    assert set(get_type_hints(GenerationOptions)) == fields


def test_a_stream_ends_at_its_length():
    tokens = continued([1, 2, 3, 4], max_new_tokens=3)
    assert summary(tokens) == ("bcd", "length")
    assert [token.finish_reason for token in tokens] == [None, None, "length"]


def test_a_stop_token_ends_a_stream_without_its_text():
    tokens = continued([1, 9, 3], stop_tokens=[9])
    assert summary(tokens) == ("b", "stop")
    assert [token.id for token in tokens] == [1, 9]


def test_a_stop_string_ends_a_stream_and_later_rows_are_discarded():
    tokens = continued([1, 2, 3, 4, 5], stop="de")
    assert summary(tokens) == ("bc", "stop")
    assert [token.id for token in tokens] == [1, 2, 3, 4]


def test_text_that_waited_for_a_stop_string_comes_with_the_last_token():
    assert summary(continued([1, 3], max_new_tokens=2, stop=["dx"])) == ("bd", "length")
    assert summary(continued([1, 3, 9], stop_tokens=[9], stop=["dx"])) == ("bd", "stop")


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    stream = Stream(0, [0], GenerationSettings(max_new_tokens=1), frozenset(), None)
    assert stream.take(3, -0.5) == Token(
        stream=0, id=3, text="", logprob=-0.5, finish_reason="length"
    )


def test_streams_end_on_their_own():
    settings = GenerationSettings(max_new_tokens=3)
    streams = [Stream(row, [0], settings, frozenset([9]), None) for row in range(2)]
    rows = iter([([9, 1], [-1.0, -2.0]), ([5, 2], [-1.0, -2.0]), ([5, 9], [-1.0, -3.0])])
    tokens = list(follow(rows, streams))
    assert [(token.stream, token.id) for token in tokens] == [(0, 9), (1, 1), (1, 2), (1, 9)]
    assert tokens[-1].logprob == -3.0


def test_rows_are_not_asked_for_beyond_the_end():
    def rows():
        yield [9], None
        raise AssertionError("one row too many")

    stream = Stream(0, [0], GenerationSettings(), frozenset([9]), None)
    assert len(list(follow(rows(), [stream]))) == 1


def test_the_speed_counts_what_came_after_the_first_tokens():
    recorder = Recorder(2)
    for step in range(3):
        for stream in range(2):
            time.sleep(0.01)
            reason = "length" if step == 2 else None
            recorder.add(
                Token(stream=stream, id=step, text="x", logprob=-0.5, finish_reason=reason)
            )
    result = recorder.result()
    assert result.tokens == ((0, 1, 2), (0, 1, 2))
    assert result.texts == ("xxx", "xxx")
    assert result.logprobs == ((-0.5,) * 3,) * 2
    assert result.finish_reasons == ("length", "length")
    assert 0.02 <= result.prefill_seconds < result.decode_seconds
    assert result.tokens_per_second == 4 / result.decode_seconds


def test_a_single_token_has_no_speed():
    recorder = Recorder(1)
    recorder.add(Token(stream=0, id=1, text="", logprob=None, finish_reason="length"))
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
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GenerationSettings(**options)
