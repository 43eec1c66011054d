from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.methods import MaskRule
from tests.engine.decoding import (
    LENGTH,
    PROMPT,
    assert_close,
    by_transformers,
    cache_for,
    decoded,
    decoder_of,
    rules_of,
)
from tests.helpers import (
    ENGINE_FAMILIES,
    TOLERANCES,
    assert_as_precise_as_torch,
    plan_for,
    tiny_model,
    tiny_tokens,
)

every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)
GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite_multipliers": ("granite", GRANITE),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_wide_heads": ("llama", {"head_dim": 16}),
    "phi3_partial_rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "qwen3_biases": ("qwen3", {"attention_bias": True}),
}


@every_family
def test_dense_logits_equal_those_of_transformers(family: str, device: torch.device) -> None:
    model, tokens = tiny_model(family), tiny_tokens(1, LENGTH)[0]
    expected = by_transformers(model, tokens)
    logits = decoded(decoder_of(model.to(device)), tokens)
    assert logits.dtype == torch.float32
    assert_close(logits.cpu(), expected)


@every_family
def test_sparse_logits_equal_those_of_transformers(family: str, device: torch.device) -> None:
    model, tokens = tiny_model(family), tiny_tokens(1, LENGTH)[0]
    plan = plan_for(model, 0.4)
    expected = by_transformers(model, tokens, plan)
    logits = decoded(decoder_of(model.to(device), plan), tokens).cpu()
    assert_close(logits, expected)
    dense = by_transformers(model.cpu(), tokens)
    assert torch.allclose(logits[0], dense[0], atol=TOLERANCES["logits"])
    assert not torch.isclose(logits[1:], dense[1:], atol=0.01).all(-1).any()


@pytest.mark.parametrize(("family", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_logits_of_unusual_configurations_equal_those_of_transformers(
    family: str, changes: dict[str, Any]
) -> None:
    model, tokens = tiny_model(family, **changes), tiny_tokens(1, LENGTH)[0]
    plan = plan_for(model, 0.4)
    for chosen in (None, plan):
        expected = by_transformers(model, tokens, chosen)
        assert_close(decoded(decoder_of(model, chosen), tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_family
def test_logits_of_16_bit_dtypes_are_as_accurate_as_those_of_transformers(
    family: str, dtype: torch.dtype
) -> None:
    tokens = tiny_tokens(1, LENGTH)[0]
    model = tiny_model(family).to(dtype)
    expected = by_transformers(tiny_model(family).to(dtype).double(), tokens)
    by_torch = by_transformers(model, tokens)
    logits = decoded(decoder_of(model), tokens).to(dtype)
    assert_as_precise_as_torch(logits, by_torch, expected)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, torch.bfloat16),
        ("granite", {"logits_scaling": 1.0}, torch.bfloat16),
        ("granite", {"logits_scaling": 2.0}, torch.float32),
        ("gemma2", {"final_logit_softcapping": None}, torch.bfloat16),
        ("gemma2", {"final_logit_softcapping": 5.0}, torch.float32),
    ],
    ids=["plain", "not divided", "divided", "not capped", "capped"],
)
def test_16_bit_logits_become_float32_only_if_divided_or_capped(
    family: str, changes: dict[str, Any], expected: torch.dtype
) -> None:
    decoder = decoder_of(tiny_model(family, **changes).bfloat16())
    cache, tokens = cache_for(decoder), tiny_tokens(1, 3)[0]
    assert decoder.prefill(tokens[:2], cache).dtype == expected
    assert decoder.step(tokens[2:], cache).dtype == expected


def test_logits_of_other_dtypes_are_float32() -> None:
    decoder = decoder_of(tiny_model("llama").double())
    assert decoder.prefill(tiny_tokens(1, 3)[0], cache_for(decoder)).dtype == torch.float32


@pytest.mark.parametrize("prompt", [1, 2, 23, 24])
def test_logits_do_not_depend_on_the_length_of_the_prompt(prompt: int) -> None:
    decoder, tokens = decoder_of(tiny_model("gemma3_text")), tiny_tokens(1, LENGTH)[0]
    whole = decoded(decoder, tokens, 1)
    assert_close(decoded(decoder, tokens, prompt), whole[prompt - 1 :])


@every_family
@pytest.mark.parametrize("chunk", [1, 5, 11])
def test_prefill_in_chunks_equals_prefill_at_once(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, tokens = decoder_of(tiny_model(family)), tiny_tokens(1, LENGTH)[0]
    expected = decoded(decoder, tokens, PROMPT)
    monkeypatch.setattr("teal.engine.decoder.CHUNK", chunk)
    assert_close(decoded(decoder, tokens, PROMPT), expected)


def test_prefill_continues_a_sequence_after_steps() -> None:
    decoder, tokens = decoder_of(tiny_model("mistral")), tiny_tokens(1, LENGTH)[0]
    cache = cache_for(decoder)
    decoder.prefill(tokens[:9], cache)
    decoder.step(tokens[9:10], cache)
    logits = decoder.prefill(tokens[10:], cache)
    assert cache.lengths == [LENGTH]
    assert_close(logits, decoded(decoder, tokens)[-1])


@pytest.mark.parametrize("lengths", [(9, 2), (1, 7, 3), (5, 4, 9, 1, 2, 8, 3, 6)], ids=len)
@pytest.mark.parametrize("threshold", [None, 0.4], ids=["dense", "sparse"])
def test_sequences_of_a_batch_equal_sequences_alone(
    lengths: Sequence[int], threshold: float | None
) -> None:
    model = tiny_model("gemma2")
    decoder = decoder_of(model, plan_for(model, threshold))
    sequences = tiny_tokens(len(lengths), LENGTH)
    cache = cache_for(decoder, batch_size=len(lengths))
    for index, length in enumerate(lengths):
        decoder.prefill(sequences[index, :length], cache, index)
    assert cache.lengths == list(lengths)
    steps, positions, batch = 10, torch.tensor(lengths), torch.arange(len(lengths))
    together = [decoder.step(sequences[batch, positions + i], cache) for i in range(steps)]
    for index, length in enumerate(lengths):
        apart = decoded(decoder, sequences[index, : length + steps], length)[1:]
        assert_close(torch.stack([logits[index] for logits in together]), apart)


def test_last_position_of_the_cache_is_used_and_the_next_refused() -> None:
    decoder, tokens = decoder_of(tiny_model("llama")), tiny_tokens(1, LENGTH)[0]
    cache = cache_for(decoder, capacity=9)
    decoder.prefill(tokens[:8], cache)
    logits = decoder.step(tokens[8:9], cache)
    assert cache.lengths == [9]
    assert_close(logits[0], decoded(decoder, tokens[:9], 9)[0])
    with pytest.raises(UserError, match=r"10 tokens need room and the cache has 9\. Shorten"):
        decoder.prefill(tokens[9:10], cache)


def test_cache_can_be_reused_after_a_longer_sequence() -> None:
    decoder, tokens = decoder_of(tiny_model("gemma2")), tiny_tokens(2, LENGTH)
    cache = cache_for(decoder)
    decoder.prefill(tokens[0], cache)
    cache.reset()
    logits = decoder.prefill(tokens[1, :5], cache)
    assert_close(logits, decoded(decoder, tokens[1, :5], 5)[0])


def test_rules_can_be_changed_between_steps() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)[0]
    plan = plan_for(model, 0.4)
    decoder = decoder_of(model)
    dense = decoded(decoder, tokens)
    decoder.set_rules(rules_of(plan))
    sparse = decoded(decoder, tokens)
    decoder.set_rules({})
    assert torch.equal(decoded(decoder, tokens), dense)
    assert torch.equal(sparse[0], dense[0])
    assert not torch.isclose(sparse[1:], dense[1:], atol=0.01).all(-1).any()
    assert decoder.rules == {}


def test_equal_tokens_give_bit_equal_logits(device: torch.device) -> None:
    model, tokens = tiny_model("qwen3").to(device), tiny_tokens(1, LENGTH)[0]
    decoder = decoder_of(model, plan_for(model, 0.4))
    assert torch.equal(decoded(decoder, tokens), decoded(decoder, tokens))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("model.embed_tokens", "the embedding"),
        ("model.layers.0.self_attn.o_proj", "model.layers.0"),
        ("model.layers.1.mlp.down_proj", "model.layers.1"),
        ("lm_head", "lm_head"),
        (None, None),
    ],
)
@pytest.mark.parametrize("prompt", [True, False], ids=["prefill", "step"])
def test_first_module_that_gives_nan_is_named(
    module: str | None, found: str | None, prompt: bool
) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, LENGTH)[0]
    if module is not None:
        model.get_submodule(module).weight.data.fill_(torch.nan)
    decoder = decoder_of(model, plan_for(model, 0.1))
    cache = cache_for(decoder)
    run = decoder.prefill if prompt else decoder.step
    given = tokens if prompt else tokens[:1]
    run(given, cache)
    cache.rewind(len(given))
    assert decoder.first_nonfinite_layer(lambda: run(given, cache)) == found


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.empty(0, dtype=torch.int64), r"shape \(0,\)\. Give \(num_tokens,\)"),
        (torch.ones(1, 4, dtype=torch.int64), r"shape \(1, 4\)\. Give \(num_tokens,\)"),
        (torch.tensor([3, 97]), r"token id 97, the model knows 0 to 96\. Use the tokenizer"),
        (torch.tensor([-1, 3]), r"token id -1, the model knows 0 to 96\. Use the tokenizer"),
    ],
)
def test_bad_prompt_is_refused(tokens: Tensor, message: str) -> None:
    decoder = decoder_of(tiny_model("llama"))
    with pytest.raises(UserError, match=message):
        decoder.prefill(tokens, cache_for(decoder))


def test_rule_for_an_unknown_projection_is_refused() -> None:
    rules = {"model.layers.7.mlp.up_proj": MaskRule(threshold=0.1)}
    with pytest.raises(UserError, match=r"Unknown projection 'model\.layers\.7\.mlp\.up_proj'\."):
        decoder_of(tiny_model("llama")).set_rules(rules)


def test_rule_of_another_size_is_refused() -> None:
    rules = {"model.layers.1.mlp.up_proj": MaskRule(threshold=0.1, score_scale=torch.ones(5))}
    with pytest.raises(UserError, match=r"has shape \(5,\), its input \(32,\)\. Use the plan of"):
        decoder_of(tiny_model("llama")).set_rules(rules)
