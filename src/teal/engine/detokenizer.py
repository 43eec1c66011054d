"""Incremental detokenization: whole characters only, ending at stop strings."""

from collections.abc import Sequence
from typing import Protocol

# Stands for bytes that do not form a whole character (yet).
_REPLACEMENT = "\ufffd"
# The first new token is decoded together with this many tokens of the prompt, because some
# tokenizers drop the space before the first word that they are given.
_CONTEXT = 6


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`."""
        ...


class Detokenizer:
    """Turns the tokens of one sequence into text as they come.

    Each piece decodes a few tokens only, however long the sequence is.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Token ids of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._known = len(self._ids)

    def push(self, token: int) -> str:
        """Take the next token and return the text that it completes, possibly none."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[-_CONTEXT:]
        self._known = len(self._ids)
        return text

    def flush(self) -> str:
        """Return the whole characters that are still held back, at the end of the sequence."""
        return self._pending().rstrip(_REPLACEMENT)

    def _pending(self) -> str:
        # A prompt may end within a character, which the new tokens then complete.
        before = self._decode(self._ids[: self._known]).rstrip(_REPLACEMENT)
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class StopStrings:
    """Truncates a text at the first stop string, however the text is split into pieces.

    Args:
        stops: Strings that end the text; they are not part of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take a piece of text.

        Args:
            piece: Text that follows the earlier pieces.

        Returns:
            The text in which no stop string can begin any more, and whether one has been found.
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
        """Return the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
