from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from teal.engine.detokenizer import Detokenizer, StopStrings, Tokenizer

MODEL = Path(__file__).parents[2] / "models/py-16m"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; number 256 is special."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


class Words:
    """A tokenizer that drops the space before the first word, as SentencePiece does."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(f" word{token}" for token in token_ids).removeprefix(" ")


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(text=st.text(alphabet=st.characters(exclude_characters="\ufffd", codec="utf-8")))
def test_text_comes_in_whole_characters(text: str) -> None:
    parts = pieces(Bytes(), [65], text.encode())
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_pieces_join_to_the_text_of_the_whole_sequence(tokenizer: Any) -> None:
    text = "def größe(näme):\n    return '→ 😀 naïve'  # ünïcode\n" * 3
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids[:1]) == "def"
    assert "".join(pieces(tokenizer, ids[:1], ids[1:])) == text.removeprefix("def")


def test_space_before_the_first_new_word_is_kept() -> None:
    assert pieces(Words(), [1], [2, 3]) == [" word2", " word3", ""]


def test_incomplete_character_at_the_end_is_dropped() -> None:
    assert "".join(pieces(Bytes(), [65], "a😀".encode()[:-1])) == "a"


def test_character_that_begins_in_the_prompt_is_completed() -> None:
    euro = "€".encode()
    assert "".join(pieces(Bytes(), [65, *euro[:2]], [euro[2], 66])) == "€B"


def test_special_tokens_have_no_text() -> None:
    assert "".join(pieces(Bytes(), [256], [65, 256, 66])) == "AB"


def feed(stops: Sequence[str], parts: Sequence[str]) -> tuple[list[str], bool]:
    text = StopStrings(stops)
    released = []
    for part in parts:
        piece, is_stopped = text.push(part)
        released.append(piece)
        if is_stopped:
            return released, True
    return [*released, text.flush()], False


def test_stop_string_is_found_across_pieces_and_left_out() -> None:
    assert feed(["</end>"], ["one <", "/e", "nd> two"]) == (["one ", "", ""], True)


def test_prefix_of_a_stop_string_comes_later_if_it_goes_on_differently() -> None:
    assert feed(["</end>"], ["one </", "en", "try>"]) == (["one ", "", "</entry>", ""], False)


def test_text_held_back_comes_at_the_end() -> None:
    assert feed(["\n\n"], ["one\n"]) == (["one", "\n"], False)


def test_earliest_of_several_stop_strings_counts() -> None:
    assert feed(["two", "one"], ["zero one two"]) == (["zero "], True)


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    splits=st.lists(st.integers(0, 30)),
)
def test_stopped_text_does_not_depend_on_how_it_is_split(
    text: str, stops: list[str], splits: list[int]
) -> None:
    borders = sorted({0, len(text), *(at for at in splits if at < len(text))})
    parts = [text[a:b] for a, b in pairwise(borders)]
    released, is_stopped = feed(stops, parts)
    found = [text.find(stop) for stop in stops if stop in text]
    assert is_stopped == bool(found)
    whole = "".join(released)
    # Pieces may find an early stop string before a longer one that begins before it is complete.
    assert text.startswith(whole)
    if not found:
        assert whole == text
    else:
        assert not any(stop in whole for stop in stops)
        assert any(text[len(whole) :].startswith(stop) for stop in stops)
