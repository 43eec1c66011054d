"""What is asked of the engine and what it gives back: settings, tokens, generations."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from teal.engine.detokenizer import Detokenizer, StopStrings, Tokenizer
from teal.engine.sampler import SamplingSettings
from teal.foundation.errors import UserError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SamplingSettings):
    """How a prompt is continued, and until when.

    Attributes:
        max_new_tokens: Tokens per stream at most.
        stop: Strings that end a stream; its text ends before them.
        stop_tokens: Token ids that end a stream; `None` takes the end tokens of the model's
            generation configuration, an empty list none.
        logprobs: Whether to tell how likely each token was.
        sparsity: Another sparsity of the plan for this call: 0 decodes dense, `None` takes the plan
            as it is.

    Raises:
        UserError: A value is out of range.
    """

    max_new_tokens: int = 64
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    logprobs: bool = False
    sparsity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens!r} is below 1. Ask for a token.")
        if not all(self.stop_strings):
            raise UserError("A stop string is empty. Give strings of one character or more.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a stream."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationSettings` as keyword arguments."""

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_tokens: Sequence[int] | None
    logprobs: bool
    sparsity: float | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of one stream.

    Attributes:
        stream: Which prompt it continues.
        id: Token id.
        text: Text that is certain by now, often that of the tokens before; empty without a
            tokenizer. The texts of a stream, joined, are its continuation.
        logprob: Logarithm of its probability under the unchanged logits, where asked for.
        finish_reason: Why the stream ends with this token, or `None` if it goes on.
    """

    stream: int
    id: int
    text: str
    logprob: float | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuations of all prompts of a call.

    Attributes:
        tokens: New token ids of every stream, with the one that ended it.
        texts: Their texts, without stop strings and special tokens; empty without a tokenizer.
        logprobs: Logarithms of the tokens' probabilities, where asked for.
        finish_reasons: "stop" for an end token or stop string, "length" for `max_new_tokens`.
        prefill_seconds: Time until every stream had its first token.
        decode_seconds: Time from there to the last token.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    logprobs: tuple[tuple[float, ...], ...] | None
    finish_reasons: tuple[FinishReason, ...]
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first of every stream per second of decoding, 0 where there are none."""
        decoded = sum(len(tokens) - 1 for tokens in self.tokens)
        return decoded / self.decode_seconds if decoded else 0.0


class Recorder:
    """Gathers the tokens of a call into a `Generation`; its clock starts when it is made.

    Args:
        streams: Number of prompts.
    """

    def __init__(self, streams: int) -> None:
        self._tokens: list[list[Token]] = [[] for _ in range(streams)]
        self._started = self._first = self._last = time.perf_counter()

    def add(self, token: Token) -> None:
        """Take the next token, just when it has come."""
        self._last = time.perf_counter()
        self._tokens[token.stream].append(token)
        if len(self._tokens[token.stream]) == 1:
            self._first = self._last

    def result(self) -> Generation:
        """Return what has come; every stream has ended."""
        logprobs = [[token.logprob for token in tokens] for tokens in self._tokens]
        return Generation(
            tokens=tuple(tuple(token.id for token in tokens) for tokens in self._tokens),
            texts=tuple("".join(token.text for token in tokens) for tokens in self._tokens),
            logprobs=None
            if None in logprobs[0]
            else tuple(tuple(value for value in row if value is not None) for row in logprobs),
            finish_reasons=tuple(
                tokens[-1].finish_reason or "length" for tokens in self._tokens if tokens
            ),
            prefill_seconds=self._first - self._started,
            decode_seconds=self._last - self._first,
        )


class Stream:
    """One continuation under way: decides when it ends and what of its text is certain.

    Args:
        index: Which prompt it continues.
        prompt: Token ids of that.
        settings: When it ends.
        stop_tokens: Token ids that end it.
        tokenizer: The model's, or `None` for no text.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        settings: GenerationSettings,
        stop_tokens: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._index = index
        self._left = settings.max_new_tokens
        self._stop_tokens = stop_tokens
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self._stops = StopStrings(settings.stop_strings)
        self.finish_reason: FinishReason | None = None

    def take(self, token: int, logprob: float | None) -> Token:
        """Take the next token id and return it with its text."""
        self._left -= 1
        if token in self._stop_tokens:
            self.finish_reason = "stop"
            text = self._rest()
        else:
            text = self._text(token)
        return Token(
            stream=self._index,
            id=token,
            text=text,
            logprob=logprob,
            finish_reason=self.finish_reason,
        )

    def _text(self, token: int) -> str:
        piece = self._detokenizer.push(token) if self._detokenizer else ""
        text, is_stopped = self._stops.push(piece)
        if is_stopped:
            self.finish_reason = "stop"
        elif not self._left:
            self.finish_reason = "length"
            text += self._rest()
        return text

    def _rest(self) -> str:
        """Return what was held back, up to a stop string that only its end completes."""
        piece = self._detokenizer.flush() if self._detokenizer else ""
        text, is_stopped = self._stops.push(piece)
        if is_stopped:
            self.finish_reason = "stop"
        return text + self._stops.flush()


def follow(
    rows: Iterator[tuple[Sequence[int], Sequence[float] | None]], streams: Sequence[Stream]
) -> Iterator[Token]:
    """Yield the tokens of streams that go on, until none does.

    Args:
        rows: Per step, the token ids of all streams and their logarithmic probabilities.
        streams: The continuations.
    """
    for tokens, logprobs in rows:
        for row, stream in enumerate(streams):
            if stream.finish_reason is None:
                yield stream.take(tokens[row], None if logprobs is None else logprobs[row])
        if all(stream.finish_reason for stream in streams):
            return
