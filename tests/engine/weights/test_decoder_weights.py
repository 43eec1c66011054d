from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teal.engine.weights.decoder_weights import require_all_read, transposed_parts
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of
from teal.models.families import blocks_of
from tests.helpers import ENGINE_FAMILIES, tiny_model

every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)
BIASED = [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {})]


def copies(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


@every_family
def test_matrices_hold_the_projections_of_an_input_side_by_side(family: str) -> None:
    model = tiny_model(family)
    before = copies(model)
    layers = from_model(model).layers
    for block, layer in zip(blocks_of(model), layers, strict=True):
        matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
        for names, matrix in zip(block.inputs.values(), matrices, strict=True):
            expected = torch.cat([before[f"{name}.weight"].t() for name in names], dim=1)
            assert matrix.is_contiguous()
            assert torch.equal(matrix, expected)


@pytest.mark.parametrize(("family", "changes"), BIASED, ids=["llama", "qwen2"])
def test_biases_are_concatenated_in_the_order_of_the_projections(
    family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(family, **changes)
    for block, layer in zip(blocks_of(model), from_model(model).layers, strict=True):
        biases = (layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias)
        for names, bias in zip(block.inputs.values(), biases, strict=True):
            own = [model.get_submodule(name).bias for name in names]
            if own[0] is None:
                assert bias is None
            else:
                assert bias is not None
                assert torch.equal(bias, torch.cat(own))


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_weights_include_the_offset_exactly(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    before = copies(model)
    offset = 1.0 if family.startswith("gemma") else 0.0
    weights = from_model(model)
    norm_weight = before["model.norm.weight"].float() + offset
    assert weights.final_norm.dtype == (torch.float32 if offset else dtype)
    assert torch.equal(weights.final_norm.float(), norm_weight)


@every_family
def test_norms_of_a_layer_are_where_its_form_says(family: str) -> None:
    model = tiny_model(family)
    layer = from_model(model).layers[0]
    norms = {
        name: module.weight.data
        for name, module in model.model.layers[0].named_modules()
        if name.endswith("norm")
    }
    found = [layer.attention_norm, layer.mlp_norm, layer.attention_post_norm, layer.mlp_post_norm]
    found += [layer.q_norm, layer.k_norm]
    offset = 1.0 if family.startswith("gemma") else 0.0
    sums = sorted(
        float((norm_weight - offset).sum()) for norm_weight in found if norm_weight is not None
    )
    expected = sorted(float(weight.sum()) for weight in norms.values())
    assert sums == pytest.approx(expected, abs=1e-4)
    named = architecture_of(model.config).form.attention_post_norm
    if named is not None:
        assert layer.attention_post_norm is not None
        assert torch.equal(layer.attention_post_norm, norms[named] + offset)


@pytest.mark.parametrize("tied", [False, True])
def test_head_is_the_embedding_only_if_they_are_tied(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    weights = from_model(model)
    assert (weights.head is weights.embedding) is tied
    assert torch.equal(weights.head, model.lm_head.weight)
    assert torch.equal(weights.embedding, model.get_input_embeddings().weight)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_count_each_weight_once(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    expected = sum(parameter.nbytes for parameter in model.parameters())
    assert from_model(model).num_bytes == expected


def test_transposed_parts_are_views_shaped_like_linear_weights() -> None:
    fused = torch.arange(12.0).view(2, 6)
    first, second = transposed_parts(fused, {"a": 2, "b": 4})
    assert torch.equal(first, torch.tensor([[0.0, 6.0], [1.0, 7.0]]))
    assert second.shape == (4, 2)
    assert second.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_unread_parameter_of_a_layer_is_refused() -> None:
    architecture = architecture_of(tiny_model("llama").config)
    names = {"model.layers.1.a.weight", "model.layers.1.b.weight", "visual.weight"}
    with pytest.raises(UserError, match=r"'m' holds model\.layers\.1\.b\.weight, .* Run the"):
        require_all_read(architecture, names, {"model.layers.1.a.weight"}, "'m'")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.x", "visual.weight"]
)
def test_computed_and_unrelated_parameters_may_stay_unread(name: str) -> None:
    require_all_read(architecture_of(tiny_model("llama").config), {name}, set(), "'m'")


def test_weights_say_their_dtype_and_device() -> None:
    weights = from_model(tiny_model("llama").to(torch.float16))
    assert weights.dtype == torch.float16
    assert weights.device == torch.device("cpu")
    assert isinstance(weights.embedding, Tensor)
    assert not isinstance(weights.embedding, nn.Parameter)
