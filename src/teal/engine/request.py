"""What the engine is asked for and what it returns: settings, requests, generations."""

import time
from collections import abc
from dataclasses import dataclass
from typing import TypedDict

from teal.engine.decoder import Decoder
from teal.engine.sampler import SamplingForm, SamplingSettings
from teal.engine.sequence import FinishReason, Sequence, Token
from teal.foundation.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SamplingSettings):
    """How prompts are continued, and until when.

    Attributes:
        max_new_tokens: Largest number of new tokens per sequence.
        stop: Strings that end a sequence; its text ends before them.
        stop_tokens: Token ids that end a sequence; `None` takes the end tokens of the model's
            generation configuration, an empty list none.
        logprobs: Whether to return the log-probability of each token.
        sparsity: Another sparsity of the plan for this call: 0 decodes dense, `None` takes the plan
            as it is.

    Raises:
        UserError: A value is out of range.
    """

    max_new_tokens: int = 64
    stop: str | abc.Sequence[str] = ()
    stop_tokens: abc.Sequence[int] | None = None
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
        """The strings that end a sequence."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationSettings` as keyword arguments."""

    max_new_tokens: int
    stop: str | abc.Sequence[str]
    stop_tokens: abc.Sequence[int] | None
    logprobs: bool
    sparsity: float | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A validated call of the engine.

    Attributes:
        decoder: Decoder at the sparsity asked for.
        settings: Settings of the call.
        sequences: One per prompt, without any token yet.
    """

    decoder: Decoder
    settings: GenerationSettings
    sequences: abc.Sequence[Sequence]

    @property
    def form(self) -> SamplingForm:
        """Which operations the choice of a token takes."""
        return SamplingForm.of(self.settings, logprobs=self.settings.logprobs)

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and its continuation."""
        longest = max(len(sequence.prompt) for sequence in self.sequences)
        return longest + self.settings.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The continuations of all prompts of a call.

    Attributes:
        tokens: New token ids of every sequence, including the one that ended it.
        texts: Their texts, without stop strings and special tokens; empty without a tokenizer.
        logprobs: Log-probabilities of the tokens, if asked for.
        finish_reasons: "stop" for an end token or stop string, "length" for `max_new_tokens`.
        prefill_seconds: Time until every sequence had its first token.
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
        """Tokens after the first of every sequence per second of decoding, 0 if there are none."""
        decoded = sum(len(tokens) - 1 for tokens in self.tokens)
        return decoded / self.decode_seconds if decoded else 0.0


class Recorder:
    """Collects the tokens of a call into a `Generation`; its clock starts at construction.

    Args:
        batch_size: Number of prompts.
    """

    def __init__(self, batch_size: int) -> None:
        self._tokens: list[list[Token]] = [[] for _ in range(batch_size)]
        self._started = self._first = self._last = time.perf_counter()

    def add(self, token: Token) -> None:
        """Take the next token, as soon as it has come."""
        self._last = time.perf_counter()
        self._tokens[token.sequence].append(token)
        if len(self._tokens[token.sequence]) == 1:
            self._first = self._last

    def result(self) -> Generation:
        """Return the continuations, after every sequence has ended."""
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
