"""The engine: continues one to eight prompts at once, dense or sparse along the same path."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from teal.engine.cuda_graph import Row
from teal.engine.decoder import Decoder
from teal.engine.detokenizer import Tokenizer
from teal.engine.layers import Rules
from teal.engine.request import (
    Generation,
    GenerationOptions,
    GenerationSettings,
    Recorder,
    Stream,
    Token,
    follow,
)
from teal.engine.runner import Session
from teal.engine.sampler import BROKEN
from teal.engine.weights.loader import OpenedModel, open_model
from teal.foundation.errors import UserError
from teal.linear import DECODE_ROWS
from teal.models.weight_format import warn_of_format
from teal.plan import SparsityPlan
from teal.quantization import Scheme

# Decoders of other sparsities that are kept; each holds a list of arguments, and no weights.
_DECODERS = 8
_LEAST_CAPACITY = 256

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


class Engine:
    """Continues prompts: prefill dense, every new token sparse where there is a plan.

    Args:
        model: A Hugging Face model, sparse or dense, whose parameters become views of fused weights
            in place, so that it goes on working and nothing is copied; or a model folder; or a name
            on the Hugging Face hub.
        plan: What to drop where; without one the engine is dense.
        tokenizer: Where texts or stop strings are wanted; by default the one in the folder.
        device: "auto", "cpu" or "cuda"; a model in memory stays where it is.
        dtype: "auto", "float32", "bfloat16" or "float16"; a model in memory stays as it is.
        capacity: Tokens of prompt and continuation that each stream can hold; by default memory
            grows with what is asked for, up to the model's context.
        quantize: "int8", "int4" or "fp8", or a scheme: into what projections are rounded to the
            nearest values while they are read. A quantized checkpoint is opened as it is. A model
            in memory stays as it is beside them.
        quantize_head: Round the head to int8 too.

    Attributes:
        tokenizer: What token ids mean, or `None`.
        end_tokens: Token ids that end a text, from the model's generation configuration.

    Raises:
        UserError: The model cannot be opened or is not one that the engine runs, the plan is that
            of another model, or the capacity exceeds the model's context.
    """

    def __init__(
        self,
        model: nn.Module | str | Path | OpenedModel,
        plan: SparsityPlan | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        dtype: str = "auto",
        capacity: int | None = None,
        quantize: str | Scheme | None = None,
        quantize_head: bool = False,
    ) -> None:
        if not isinstance(model, OpenedModel):
            model = open_model(
                model,
                tokenizer=tokenizer,
                device=device,
                dtype=dtype,
                quantize=quantize,
                quantize_head=quantize_head,
            )
        self._architecture = model.architecture
        self._weights = model.weights
        self._plan = plan
        self._capacity = self._checked(capacity)
        if plan is not None:
            plan.model.require(model.architecture.identity, "plan")
            warn_of_format(plan.weight_format, model.weight_format)
        self.tokenizer = tokenizer or model.tokenizer
        self.end_tokens = model.end_tokens
        self._decoders: dict[float | None, Decoder] = {}
        self._session: Session | None = None
        self._lock = threading.Lock()

    def generate(self, input_ids: Prompts, **options: Unpack[GenerationOptions]) -> Generation:
        """Continue prompts to their ends.

        Args:
            input_ids: Token ids of one prompt, (tokens,), or of up to 8 prompts, (streams, tokens)
                or a list of token lists of any lengths; without padding.
            options: The fields of `GenerationSettings`.

        Returns:
            The continuations, without the prompts.

        Raises:
            UserError: An option is out of range, a prompt is empty or too long, the engine is
                already decoding, or the logits hold NaN.
        """
        request = self._request(input_ids, options)
        with self._exclusively():
            rows = self._begin(request)
            recorder = Recorder(len(request.prompts))
            for token in follow(rows, request.streams):
                recorder.add(token)
        return recorder.result()

    def stream(self, input_ids: Prompts, **options: Unpack[GenerationOptions]) -> Iterator[Token]:
        """Continue prompts and yield every token as it comes.

        The engine is busy until the iterator ends or is closed.

        Args:
            input_ids: As `generate`.
            options: As `generate`.

        Yields:
            Tokens; those of one step in the order of their streams.

        Raises:
            UserError: As `generate`.
        """
        request = self._request(input_ids, options)
        return self._tokens_of(request)

    def decoder(self, sparsity: float | None = None) -> Decoder:
        """Return the decoder of the engine's weights at a sparsity of the plan.

        Args:
            sparsity: 0 for dense, `None` for the plan as it is.

        Raises:
            UserError: There is no plan, or it has no such sparsity.
        """
        if sparsity not in self._decoders:
            rules = _rules(self._plan, sparsity)
            if len(self._decoders) == _DECODERS:
                del self._decoders[next(iter(self._decoders))]
            self._decoders[sparsity] = Decoder(self._architecture, self._weights, rules)
        return self._decoders[sparsity]

    def _tokens_of(self, request: "_Request") -> Iterator[Token]:
        with self._exclusively():
            yield from follow(self._begin(request), request.streams)

    def _request(self, input_ids: Prompts, options: GenerationOptions) -> "_Request":
        settings = GenerationSettings(**options)
        if settings.stop_strings and self.tokenizer is None:
            raise UserError(
                "Stop strings need a tokenizer. Give the engine one, or stop_tokens instead."
            )
        prompts = _prompts(input_ids)
        self._check(prompts, settings)
        stop_tokens = self.end_tokens
        if settings.stop_tokens is not None:
            stop_tokens = frozenset(settings.stop_tokens)
        streams = [
            Stream(index, prompt, settings, stop_tokens, self.tokenizer)
            for index, prompt in enumerate(prompts)
        ]
        return _Request(prompts, settings, streams, self.decoder(settings.sparsity))

    def _check(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
        if not 1 <= len(prompts) <= DECODE_ROWS:
            raise UserError(
                f"{len(prompts)} prompts were given. Give 1 to {DECODE_ROWS} at a time."
            )
        if not all(prompts):
            raise UserError("The prompt is empty. Give some text to continue.")
        longest = max(map(len, prompts))
        limit = self._capacity or self._architecture.max_context
        name = "the engine's capacity" if self._capacity else "the model's context"
        if longest + settings.max_new_tokens > limit:
            raise UserError(
                f"A prompt of {longest} tokens and {settings.max_new_tokens} new ones exceed "
                f"{name} of {limit}. Shorten the prompt or ask for fewer tokens."
            )

    @torch.inference_mode()
    def _begin(self, request: "_Request") -> Iterator[Row]:
        """Get everything ready that is not part of the decoding, and return the rows to come."""
        need = max(map(len, request.prompts)) + request.settings.max_new_tokens
        session = self._session
        if session is None or not session.fits(len(request.prompts), need):
            # Its memory is free before the next one takes any.
            session = self._session = None
            capacity = self._capacity or _rounded(need, self._architecture.max_context)
            session = Session(self._architecture, self._weights, len(request.prompts), capacity)
            self._session = session
        session.prepare(request.decoder, request.settings)
        return self._rows(session, request)

    def _rows(self, session: Session, request: "_Request") -> Iterator[Row]:
        rows = session.rows(request.decoder, request.settings, request.prompts)
        for step, (tokens, logprobs) in enumerate(rows):
            for row, stream in enumerate(request.streams):
                if tokens[row] == BROKEN and stream.finish_reason is None:
                    layer = session.first_nonfinite_layer(
                        request.decoder, request.settings, request.prompts, step
                    )
                    raise _not_finite(layer, self._weights.embedding.dtype)
            yield tokens, logprobs

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise UserError(
                "This engine is already decoding. Let that call end, or close its stream."
            )
        try:
            yield
        finally:
            self._lock.release()

    def _checked(self, capacity: int | None) -> int | None:
        context = self._architecture.max_context
        if capacity is not None and not 1 <= capacity <= context:
            raise UserError(
                f"A capacity of {capacity} tokens was asked for. Give 1 to {context}, the model's "
                "context."
            )
        return capacity


@dataclass(frozen=True)
class _Request:
    """A checked call."""

    prompts: Sequence[Sequence[int]]
    settings: GenerationSettings
    streams: Sequence[Stream]
    decoder: Decoder


def _prompts(input_ids: Prompts) -> list[list[int]]:
    if isinstance(input_ids, Tensor):
        if input_ids.dim() not in (1, 2) or input_ids.is_floating_point():
            raise UserError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}. Give integers, "
                "(tokens,) or (streams, tokens)."
            )
        rows: list[list[int]] = (input_ids if input_ids.dim() == 2 else input_ids[None]).tolist()
        return rows
    if all(isinstance(entry, int) for entry in input_ids):
        return [[int(entry) for entry in input_ids]]  # type: ignore[arg-type]
    return [[int(token) for token in prompt] for prompt in input_ids]  # type: ignore[union-attr]


def _rules(plan: SparsityPlan | None, sparsity: float | None) -> Rules:
    if plan is None:
        if sparsity:
            raise UserError(
                f"A sparsity of {sparsity!r} was asked for and the engine has no plan. "
                "Make the engine with one."
            )
        return {}
    chosen = plan if sparsity is None else plan.at(sparsity)
    return {name: projection.rule for name, projection in chosen.projections.items()}


def _rounded(need: int, context: int) -> int:
    """Return a capacity that later, longer calls will often fit into too."""
    return min(context, max(_LEAST_CAPACITY, 1 << (need - 1).bit_length()))


def _not_finite(layer: str | None, dtype: torch.dtype) -> UserError:
    place = f"{layer} is the first to give NaN or infinity" if layer else "all layers are finite"
    return UserError(
        f"The logits hold NaN or infinity; {place}, in {str(dtype).removeprefix('torch.')}. "
        "Use bfloat16 or float32, or check the weights."
    )
