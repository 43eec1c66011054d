"""From tokens to text, one at a time: whole characters only, and an end at stop strings."""

from collections.abc import Sequence
from typing import Protocol

# What a decoder writes for bytes that are no whole character (yet).
_REPLACEMENT = "\ufffd"
# Tokens of the prompt that the first new one is decoded behind: some tokenizers drop the space
# before the first word they are given.
_CONTEXT = 6


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`."""
        ...


class Detokenizer:
    """Turns one stream of tokens into text as it comes.

    Each piece costs the decoding of a few tokens, however long the stream is.

    Args:
        tokenizer: The model's.
        prompt: What the stream continues.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._known = len(self._ids)

    def push(self, token: int) -> str:
        """Take the next token and return the text that it completes, often none."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[-_CONTEXT:]
        self._known = len(self._ids)
        return text

    def flush(self) -> str:
        """Return the whole characters that are still held back, at the end of the stream."""
        return self._pending().rstrip(_REPLACEMENT)

    def _pending(self) -> str:
        # A prompt may end within a character, which the stream then completes.
        before = self._decode(self._ids[: self._known]).rstrip(_REPLACEMENT)
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Ends a text at the first of some strings, wherever the borders of its pieces are.

    Args:
        stops: Strings that end the text; they are not part of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece of text.

        Args:
            piece: What follows on the pieces before.

        Returns:
            The text that no stop string can begin in any more, and whether one has been found.
        """
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        safe = len(text) - self._possible_beginning(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
