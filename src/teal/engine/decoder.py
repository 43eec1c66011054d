"""A decoder: prefill with many tokens of a sequence at once, decode steps with one per sequence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.engine.kv_cache import KeyValueCache
from teal.engine.layers import (
    Attention,
    CacheEntry,
    LayerCalls,
    Observer,
    Rules,
    dense_calls,
    run_layer,
)
from teal.engine.prefill_attention import attend_many
from teal.engine.weights.decoder_weights import DecoderWeights
from teal.engine.weights.matrix import head_product
from teal.foundation.errors import UserError, unknown_name
from teal.kernels.ops import attend
from teal.kernels.reference.matmul import rms_norm
from teal.methods import MaskRule
from teal.models.architectures import Architecture

# Prefill runs this many tokens at once: enough to keep any device busy.
CHUNK = 1024


class Stepper(Protocol):
    """Computes a decode step."""

    def __call__(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append a token to every sequence; see `Decoder.step`."""
        ...


class Decoder:
    """Runs a model on a cache: prefill dense, decode steps dense or sparse.

    Args:
        architecture: Architecture of the model.
        weights: Weights of the model.
        rules: Rules of the decode steps by full projection name; a projection without one is dense.
        tuning: Folder of tuning tables, "" for the tables that the package ships.

    Attributes:
        architecture: Architecture of the model.
        weights: Weights of the model.
        tuning: Folder of tuning tables, "" for the tables that the package ships.
        observer: If set, called with each projection input in every pass: its full name, such as
            "model.layers.3.mlp_input", and the activations, (T, in_features).

    Raises:
        UserError: No projection has such a name, or a rule does not fit its input.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: DecoderWeights,
        rules: Rules | None = None,
        *,
        tuning: str = "",
    ) -> None:
        self.architecture = architecture
        self.weights = weights
        self.tuning = tuning
        self.observer: Observer | None = None
        self._watch: Callable[[Tensor], None] | None = None
        self.embedding_multiplier = _embedding_multiplier(architecture, weights.dtype)
        # Prefill always runs these.
        self._dense = [
            dense_calls(architecture, layer, layer_weights, tuning)
            for layer, layer_weights in enumerate(weights.layers)
        ]
        self.set_rules(rules or {})

    @property
    def rules(self) -> Mapping[str, MaskRule | None]:
        """Rules of the decode steps by full projection name."""
        return self._rules

    @property
    def layers(self) -> tuple[LayerCalls, ...]:
        """Calls of each layer in a decode step."""
        return self._layers

    def set_rules(self, rules: Rules) -> None:
        """Set the rules of the following decode steps.

        Args:
            rules: Rules by full projection name; a projection without one is dense.

        Raises:
            UserError: No projection has such a name, or a rule does not fit its input.
        """
        self._require_fitting(rules)
        inputs = map(self.architecture.inputs, range(self.architecture.num_layers))
        self._layers = tuple(
            calls.with_rules(entries, rules, self.weights.dtype)
            for calls, entries in zip(self._dense, inputs, strict=True)
        )
        self._rules = dict(rules)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, cache: KeyValueCache, index: int = 0) -> Tensor:
        """Append a prompt to one sequence, dense.

        Args:
            tokens: Token ids, (num_tokens,), int64.
            cache: Cache of the batch; the sequence may hold tokens already.
            index: Index of the sequence in the batch.

        Returns:
            Logits of the next token, (vocab_size,), in the dtype of `logits_of`.

        Raises:
            UserError: The prompt is empty, has ids outside the vocabulary, or does not fit.
        """
        tokens = self._require_tokens(tokens)
        start = cache.require_room(len(tokens), index)
        for chunk in torch.split(tokens, CHUNK):
            end = start + len(chunk)
            positions = torch.arange(start, end, device=chunk.device)
            keys = (layer[index, :, :end] for layer in cache.keys)
            values = (layer[index, :, :end] for layer in cache.values)
            entries = zip(keys, values, repeat(positions), cache.cosines, cache.sines, strict=False)
            hidden = self._run(chunk, self._dense, attend_many, entries)
            start = end
        cache.positions[index] = start
        return self._logits(hidden[-1])

    @torch.inference_mode()
    def step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append one token to every sequence, sparse where there are rules.

        Neither waits for the device nor depends on values, so that a CUDA graph can capture it.
        The caller makes sure that every sequence has room.

        Args:
            tokens: Token ids, (batch_size,), int64, on the device of the weights.
            cache: Cache of the batch; its positions advance by one.

        Returns:
            Logits of the next tokens, (batch_size, vocab_size), in the dtype of `logits_of`.
        """
        entries = zip(
            cache.keys,
            cache.values,
            repeat(cache.positions),
            cache.cosines,
            cache.sines,
            strict=False,
        )
        hidden = self._run(tokens, self._layers, attend, entries)
        cache.positions += 1
        return self._logits(hidden)

    def first_nonfinite_layer(self, run: Callable[[], Tensor]) -> str | None:
        """Repeat a pass and find where NaN or infinity comes from.

        Args:
            run: Calls `prefill` or `step` again, on a cache rewound to before that pass.

        Returns:
            Name of the first module whose output is not finite: the embedding, a layer such as
            "model.layers.3", or the LM head; `None` if all outputs are finite.
        """
        finite: list[bool] = []
        self._watch = lambda hidden: finite.append(bool(hidden.isfinite().all()))
        try:
            finite_logits = bool(run().isfinite().all())
        finally:
            self._watch = None
        if all(finite):
            return None if finite_logits else "lm_head"
        layer = finite.index(False) % (self.architecture.num_layers + 1)
        return self.architecture.layer_name(layer - 1) if layer else "the embedding"

    def _run(
        self,
        tokens: Tensor,
        layers: Sequence[LayerCalls],
        attention: Attention,
        entries: Iterable[CacheEntry],
    ) -> Tensor:
        hidden = F.embedding(tokens, self.weights.embedding)
        if self.embedding_multiplier != 1.0:
            hidden = hidden * self.embedding_multiplier
        if self._watch:
            self._watch(hidden)
        for calls, entry in zip(layers, entries, strict=True):
            hidden = run_layer(hidden, calls, attention, entry, self.observer)
            if self._watch:
                self._watch(hidden)
        return hidden

    def logits_of(self, normed: Tensor) -> Tensor:
        """Return the logits of normed hidden states.

        Args:
            normed: Hidden states after the final norm, (..., hidden_size).

        Returns:
            (..., vocab_size), float32; in the dtype of `normed` if that has 16 bits and the logits
            are neither divided nor capped.
        """
        logits = head_product(normed, self.weights.head)
        divisor, softcap = self.architecture.logit_divisor, self.architecture.logit_softcap
        if logits.itemsize == 2 and divisor == 1.0 and not softcap:
            return logits
        logits = logits.float()
        if divisor != 1.0:
            logits = logits / divisor
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def _logits(self, hidden: Tensor) -> Tensor:
        weights, eps = self.weights, self.architecture.eps
        return self.logits_of(rms_norm(hidden, weights.final_norm, eps))

    def _require_tokens(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 1 or not len(tokens):
            raise UserError(
                f"The prompt has shape {tuple(tokens.shape)}. Give (num_tokens,), one or more."
            )
        low, high = int(tokens.min()), int(tokens.max())
        size = self.architecture.vocab_size
        if low < 0 or high >= size:
            raise UserError(
                f"The prompt has token id {low if low < 0 else high}, the model knows 0 to "
                f"{size - 1}. Use the tokenizer of this model."
            )
        return tokens.to(self.weights.device)

    def _require_fitting(self, rules: Rules) -> None:
        shapes = self.architecture.identity.shapes
        for name, rule in rules.items():
            if name not in shapes:
                raise unknown_name("projection", name, shapes)
            for kind, vector in (rule.vectors if rule else {}).items():
                expected = (shapes[name][0],)
                if tuple(vector.shape) != expected:
                    raise UserError(
                        f"The {kind} of {name} has shape {tuple(vector.shape)}, its input "
                        f"{expected}. Use the plan of this model."
                    )


def _embedding_multiplier(architecture: Architecture, dtype: torch.dtype) -> float:
    if not architecture.form.embedding_scaled:
        return architecture.embedding_multiplier
    # Gemma was trained with the factor rounded like the weights.
    return float(torch.tensor(architecture.embedding_multiplier, dtype=dtype))
