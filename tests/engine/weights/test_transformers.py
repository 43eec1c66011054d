import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from teal.engine.weights.decoder_weights import DecoderWeights
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from teal.models.families import projections_of
from teal.sparsification import densify, sparsify
from tests.helpers import ENGINE_FAMILIES, TOLERANCES, logits_of, plan_for, tiny_model, tiny_tokens

every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def matrices(weights: DecoderWeights) -> list[Tensor]:
    fused = [m for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [weights.embedding, *fused, weights.head]


def peak_bytes(action: Any) -> int:
    """Return the most bytes that were held at once of those that `action` allocated."""
    with profile(profile_memory=True) as profiler:
        action()
    current = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


@every_family
def test_model_shares_every_matrix_with_the_weights(family: str) -> None:
    model = tiny_model(family)
    weights = from_model(model)
    shared = {storage(matrix) for matrix in matrices(weights)}
    assert {storage(p) for p in model.parameters() if p.dim() == 2} == shared


@every_family
def test_model_computes_the_same_logits_as_before(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens(2, 24)
    before = logits_of(model, tokens)
    from_model(model)
    after = logits_of(model, tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCES["logits"])


def test_change_of_the_model_shows_in_the_weights() -> None:
    model = tiny_model("llama")
    weights = from_model(model)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    gate, up = weights.layers[0].gate_up.chunk(2, dim=1)
    assert not up.any()
    assert gate.all()


def test_peak_is_the_weights_and_the_largest_fused_matrix() -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = 256 * 1024 * 4
    # The profiler sees what is allocated under its eyes, so it watches the copy being made too.
    peak = peak_bytes(lambda: from_model(copy.deepcopy(model)))
    assert weights + largest <= peak <= weights + 1.05 * largest


@every_family
def test_weights_of_a_model_that_already_shares_are_the_same_memory(family: str) -> None:
    model = tiny_model(family)
    first, second = from_model(model), from_model(model)
    for one, other in zip(matrices(first), matrices(second), strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert one.shape == other.shape
        assert other.is_contiguous()


def test_sparse_model_shares_its_weights_and_stays_sparse() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, 24)
    sparsify(model, plan_for(model, 0.5), sparse_from=0.0)
    before = logits_of(model, tokens)
    from_model(model)
    after = logits_of(model, tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCES["logits"])
    densify(model)
    assert all(isinstance(linear, nn.Linear) for linear in projections_of(model).values())


def test_model_can_be_saved_as_contiguous_tensors(tmp_path: Any) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(1, 24)
    before = logits_of(model, tokens)
    from_model(model)
    contiguous = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=contiguous)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again, tokens), before, rtol=0, atol=TOLERANCES["logits"])


def test_model_in_two_dtypes_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"gate_proj\.weight is torch\.bfloat16 .* one dtype"):
        from_model(model)


def test_parameter_of_another_size_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm.weight = nn.Parameter(torch.ones(5))
    with pytest.raises(UserError, match=r"norm\.weight has shape \(5,\), the conf.* says \(32,\)"):
        from_model(model)


def test_model_with_more_than_the_engine_knows_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].adapter = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM holds .*adapter\.bias, .* Run the"):
        from_model(model)


def test_model_without_a_head_is_refused() -> None:
    model = tiny_model("llama")
    del model.lm_head
    with pytest.raises(UserError, match=r"lacks lm_head\.weight\. Give a complete"):
        from_model(model)


def test_model_that_transformers_quantized_is_refused() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UserError, match=r"opened this model quantized\. Give its folder to teal"):
        from_model(model)
