"""The engine: continues one to eight prompts at once, dense and sparse along the same path."""

import threading
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from teal.engine.decoder import Decoder
from teal.engine.detokenizer import Tokenizer
from teal.engine.layers import Rules
from teal.engine.request import (
    Generation,
    GenerationOptions,
    GenerationSettings,
    Recorder,
    Request,
)
from teal.engine.runner import Runner
from teal.engine.sequence import Sequence, Token
from teal.engine.weights.loader import OpenedModel, open_model
from teal.foundation.errors import UserError
from teal.kernels.tuning import tuning_folder
from teal.linear import DECODE_ROWS
from teal.models.weight_format import warn_of_format
from teal.plan import SparsityPlan
from teal.quantization import Scheme

# Decoders of other sparsities that are kept; each holds thresholds and no weights.
_DECODERS = 8
_MIN_CAPACITY = 256

Prompts = Tensor | abc.Sequence[int] | abc.Sequence[abc.Sequence[int]] | abc.Sequence[Tensor]


class Engine:
    """Continues prompts: prefill dense, every new token sparse if there is a plan.

    Args:
        model: A Hugging Face model, sparse or dense, whose parameters become views of fused weights
            in place, so that it goes on working and nothing is copied; or a model folder; or a name
            on the Hugging Face hub.
        plan: Sparsity plan of the model; without one the engine is dense.
        tokenizer: Tokenizer for texts and stop strings; by default the one in the folder.
        device: "auto", "cpu" or "cuda"; a model in memory stays where it is.
        dtype: "auto", "float32", "bfloat16" or "float16"; a model in memory keeps its dtype.
        capacity: Tokens of prompt and continuation that each sequence can hold; by default memory
            grows with the requests, up to the model's context.
        quantize: "int8", "int4" or "fp8", or a scheme: format to which projections are rounded to
            nearest while they are read. A quantized checkpoint is opened as it is. A model in
            memory keeps its floats, and the quantized weights come on top.
        quantize_head: Round the LM head to int8 too.
        tuning: Folder of tuning tables written by `teal bench … --tune`; by default the tables that
            the package ships.

    Attributes:
        tokenizer: Tokenizer for texts and stop strings, or `None`.
        end_tokens: Token ids that end a text, from the model's generation configuration.

    Raises:
        UserError: The model cannot be opened or is not supported, the plan belongs to another
            model, the capacity exceeds the model's context, or the tuning folder holds no table.
    """

    def __init__(  # noqa: PLR0913
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
        tuning: str | Path | None = None,
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
        self._tuning = tuning_folder(tuning)
        self._capacity = self._checked(capacity)
        if plan is not None:
            plan.model.require(model.architecture.identity, "plan")
            warn_of_format(plan.weight_format, model.weight_format)
        self.tokenizer = tokenizer or model.tokenizer
        self.end_tokens = model.end_tokens
        self._decoders: dict[float | None, Decoder] = {}
        self._runner: Runner | None = None
        self._lock = threading.Lock()

    def generate(self, input_ids: Prompts, **options: Unpack[GenerationOptions]) -> Generation:
        """Continue prompts until all of them have ended.

        Args:
            input_ids: Token ids of one prompt, (tokens,), or of up to 8 prompts,
                (batch_size, tokens) or a list of token lists of any lengths; without padding.
            options: Fields of `GenerationSettings`.

        Returns:
            The continuations, without the prompts.

        Raises:
            UserError: An option is out of range, a prompt is empty or too long, the engine is
                already decoding, or the logits hold NaN or infinity.
        """
        request = self._request(input_ids, options)
        with self._exclusively():
            runner = self._runner_for(request)
            recorder = Recorder(len(request.sequences))
            for token in runner.run(request):
                recorder.add(token)
        return recorder.result()

    def stream(self, input_ids: Prompts, **options: Unpack[GenerationOptions]) -> Iterator[Token]:
        """Continue prompts and yield every token as it comes.

        The engine is busy until the iterator ends or is closed.

        Args:
            input_ids: Token ids; see `generate`.
            options: Fields of `GenerationSettings`.

        Yields:
            Tokens; those of one step in the order of their sequences.

        Raises:
            UserError: See `generate`.
        """
        return self._tokens(self._request(input_ids, options))

    def decoder(self, sparsity: float | None = None) -> Decoder:
        """Return the decoder at a sparsity of the plan; all decoders share the weights.

        Args:
            sparsity: Target sparsity in [0, 1), 0 for dense; `None` for the plan as it is.

        Raises:
            UserError: There is no plan, or it has no such sparsity.
        """
        if sparsity not in self._decoders:
            rules = _rules(self._plan, sparsity)
            if len(self._decoders) == _DECODERS:
                del self._decoders[next(iter(self._decoders))]
            self._decoders[sparsity] = Decoder(
                self._architecture, self._weights, rules, tuning=self._tuning
            )
        return self._decoders[sparsity]

    def _tokens(self, request: Request) -> Iterator[Token]:
        with self._exclusively():
            yield from self._runner_for(request).run(request)

    def _request(self, input_ids: Prompts, options: GenerationOptions) -> Request:
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
        sequences = [
            Sequence(
                index,
                prompt,
                max_new_tokens=settings.max_new_tokens,
                stop_tokens=stop_tokens,
                stop_strings=settings.stop_strings,
                tokenizer=self.tokenizer,
            )
            for index, prompt in enumerate(prompts)
        ]
        return Request(
            decoder=self.decoder(settings.sparsity), settings=settings, sequences=sequences
        )

    def _check(
        self, prompts: abc.Sequence[abc.Sequence[int]], settings: GenerationSettings
    ) -> None:
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
    def _runner_for(self, request: Request) -> Runner:
        """Return a runner that has memory and a step for a request."""
        runner = self._runner
        if runner is None or not runner.fits(request):
            # Frees the memory of the old one before the new one takes any.
            runner = self._runner = None
            capacity = self._capacity or _rounded(
                request.max_length, self._architecture.max_context
            )
            runner = Runner(self._architecture, self._weights, len(request.sequences), capacity)
            self._runner = runner
        runner.prepare(request)
        return runner

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


def _prompts(input_ids: Prompts) -> list[list[int]]:
    if isinstance(input_ids, Tensor):
        if input_ids.dim() not in (1, 2) or input_ids.is_floating_point():
            raise UserError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}. Give integers, "
                "(tokens,) or (batch_size, tokens)."
            )
        prompts: list[list[int]] = (input_ids if input_ids.dim() == 2 else input_ids[None]).tolist()
        return prompts
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
    """Return a capacity that longer requests later will often fit into too."""
    return min(context, max(_MIN_CAPACITY, 1 << (need - 1).bit_length()))
