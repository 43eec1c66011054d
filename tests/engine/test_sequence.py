from collections.abc import Sequence as Ids

from teal.engine.sequence import Sequence, Token


class Letters:
    """A tokenizer whose token 0 is "a", 1 "b" and so on."""

    def decode(self, token_ids: Ids[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(97 + token) for token in token_ids)


def continued(
    ids: Ids[int], *, max_new_tokens: int = 64, stop_tokens: Ids[int] = (), stop: Ids[str] = ()
) -> list[Token]:
    """Append tokens to a sequence until it ends."""
    sequence = Sequence(
        0,
        [0],
        max_new_tokens=max_new_tokens,
        stop_tokens=frozenset(stop_tokens),
        stop_strings=stop,
        tokenizer=Letters(),
    )
    tokens = []
    for token in ids:
        tokens.append(sequence.take(token, None))
        assert tokens[-1].finish_reason == sequence.finish_reason
        if sequence.finish_reason is not None:
            break
    return tokens


def summary(tokens: Ids[Token]) -> tuple[str, str | None]:
    return "".join(token.text for token in tokens), tokens[-1].finish_reason


def test_sequence_ends_at_its_length() -> None:
    tokens = continued([1, 2, 3, 4], max_new_tokens=3)
    assert summary(tokens) == ("bcd", "length")
    assert [token.finish_reason for token in tokens] == [None, None, "length"]


def test_stop_token_ends_a_sequence_and_has_no_text() -> None:
    tokens = continued([1, 9, 3], stop_tokens=[9])
    assert summary(tokens) == ("b", "stop")
    assert [token.id for token in tokens] == [1, 9]


def test_stop_string_ends_a_sequence_before_it() -> None:
    tokens = continued([1, 2, 3, 4, 5], stop=["de"])
    assert summary(tokens) == ("bc", "stop")
    assert [token.id for token in tokens] == [1, 2, 3, 4]


def test_text_that_waited_for_a_stop_string_comes_with_the_last_token() -> None:
    assert summary(continued([1, 3], max_new_tokens=2, stop=["dx"])) == ("bd", "length")
    assert summary(continued([1, 3, 9], stop_tokens=[9], stop=["dx"])) == ("bd", "stop")


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    sequence = Sequence(1, [0], max_new_tokens=1)
    assert sequence.take(3, -0.5) == Token(
        sequence=1, id=3, text="", logprob=-0.5, finish_reason="length"
    )
