"""One sequence being generated: its tokens, their text, and when it ends."""

from collections import abc
from dataclasses import dataclass
from typing import Literal

from teal.engine.detokenizer import Detokenizer, StopStrings, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of one sequence.

    Attributes:
        sequence: Index of the prompt that it continues.
        id: Token id.
        text: Text that is certain by now, often that of earlier tokens; empty without a tokenizer.
            The texts of a sequence, joined, are its continuation.
        logprob: Log-probability under the unchanged logits, if asked for.
        finish_reason: Why the sequence ends with this token, or `None` if it goes on.
    """

    sequence: int
    id: int
    text: str
    logprob: float | None
    finish_reason: FinishReason | None


class Sequence:
    """A prompt and its continuation, which ends at a length, a stop token or a stop string.

    Args:
        index: Index of the prompt in the batch.
        prompt: Token ids of the prompt.
        max_new_tokens: Length at which the continuation ends, in tokens.
        stop_tokens: Token ids that end the continuation.
        stop_strings: Strings that end the continuation; its text ends before them.
        tokenizer: Tokenizer of the model, or `None` for no text.

    Attributes:
        prompt: Token ids of the prompt.
        finish_reason: Why the continuation has ended, or `None` if it goes on.
    """

    def __init__(
        self,
        index: int,
        prompt: abc.Sequence[int],
        *,
        max_new_tokens: int,
        stop_tokens: frozenset[int] = frozenset(),
        stop_strings: abc.Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.prompt = prompt
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._tokens_left = max_new_tokens
        self._stop_tokens = stop_tokens
        self._stop_strings = StopStrings(stop_strings)
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None

    def take(self, token: int, logprob: float | None) -> Token:
        """Append the next token and return it with its text.

        Args:
            token: Token id.
            logprob: Log-probability of the token, if asked for.
        """
        self._tokens_left -= 1
        if token in self._stop_tokens:
            self.finish_reason = "stop"
            text = self._rest()
        else:
            text = self._text(token)
        return Token(
            sequence=self._index,
            id=token,
            text=text,
            logprob=logprob,
            finish_reason=self.finish_reason,
        )

    def _text(self, token: int) -> str:
        piece = self._detokenizer.push(token) if self._detokenizer else ""
        text, is_stopped = self._stop_strings.push(piece)
        if is_stopped:
            self.finish_reason = "stop"
        elif not self._tokens_left:
            self.finish_reason = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        """Return the text held back, up to a stop string that only its end completes."""
        piece = self._detokenizer.flush() if self._detokenizer else ""
        text, is_stopped = self._stop_strings.push(piece)
        if is_stopped:
            self.finish_reason = "stop"
        return text + self._stop_strings.flush()
