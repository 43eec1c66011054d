"""Helpers of the engine tests: decoders of models, and the same tokens through transformers."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from teal.engine.decoder import Decoder
from teal.engine.kv_cache import KeyValueCache
from teal.engine.weights.decoder_weights import DecoderWeights
from teal.engine.weights.transformers import from_model
from teal.methods import MaskRule
from teal.models.architectures import architecture_of
from teal.plan import PlannedProjection, SparsityPlan
from teal.sparsification import densify, sparsify
from tests.helpers import TOLERANCES, plan_of

LENGTH = 24
# Longer than the rows of a decode step, so that transformers runs the prompt dense too.
PROMPT = 12


def decoder_of(model: Any, plan: SparsityPlan | None = None) -> Decoder:
    """Return a decoder that shares the weights of `model`."""
    densify(model)
    decoder = Decoder(architecture_of(model.config), from_model(model))
    if plan is not None:
        decoder.set_rules(rules_of(plan))
    return decoder


def rules_of(plan: SparsityPlan) -> dict[str, MaskRule | None]:
    return {name: planned.rule for name, planned in plan.projections.items()}


def cache_for(decoder: Decoder, *, batch_size: int = 1, capacity: int = LENGTH) -> KeyValueCache:
    weights = decoder.weights
    return KeyValueCache(decoder.architecture, batch_size, capacity, weights.dtype, weights.device)


def decoded(decoder: Decoder, tokens: Tensor, prompt: int = PROMPT) -> Tensor:
    """Prefill a prompt, then step token by token; return the logits from its end on."""
    tokens = tokens.to(decoder.weights.device)
    cache = cache_for(decoder, capacity=len(tokens))
    logits = [decoder.prefill(tokens[:prompt], cache)]
    logits += [decoder.step(token[None], cache)[0] for token in tokens[prompt:]]
    return torch.stack(logits)


@torch.no_grad()
def by_transformers(model: Any, tokens: Tensor, plan: SparsityPlan | None = None) -> Tensor:
    """Run the same tokens through the model of transformers, sparse if there is a plan."""
    if plan is not None:
        sparsify(model, plan)
    output = model(tokens[None, :PROMPT], use_cache=True)
    logits = [output.logits[0, -1]]
    for token in tokens[PROMPT:]:
        output = model(token[None, None], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0, -1])
    densify(model)
    return torch.stack(logits)


def assert_close(logits: Tensor, expected: Tensor) -> None:
    # Relative to the largest logit: the others are differences of sums as large as that.
    atol = TOLERANCES["logits"] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)


def plan_at(decoder: Decoder, tokens: Tensor, sparsity: float) -> SparsityPlan:
    """Choose thresholds from the projection inputs of some tokens."""
    quantiles: dict[str, float] = {}
    decoder.observer = lambda name, x: quantiles.update(
        {name: float(x.float().abs().quantile(sparsity))}
    )
    decoder.prefill(tokens, cache_for(decoder, capacity=len(tokens)))
    decoder.observer = None
    architecture = decoder.architecture
    planned = {
        name: PlannedProjection(
            target_sparsity=sparsity, rule=MaskRule(threshold=quantiles[entry.name])
        )
        for layer in range(architecture.num_layers)
        for entry in architecture.inputs(layer)
        for name in entry.output_sizes
    }
    return plan_of(architecture.identity, planned)


def tensors_of(weights: DecoderWeights) -> list[Tensor | None]:
    own = [weights.embedding, weights.final_norm, weights.head]
    return own + [getattr(layer, field.name) for layer in weights.layers for field in fields(layer)]


def assert_same_weights(one: DecoderWeights, other: DecoderWeights) -> None:
    for first, second in zip(tensors_of(one), tensors_of(other), strict=True):
        assert (first is None) is (second is None)
        if first is not None and second is not None:
            assert first.dtype == second.dtype
            assert torch.equal(first, second)
