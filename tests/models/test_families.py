import pytest
import torch
from torch import nn

from teal.foundation.errors import UserError
from teal.models.families import (
    FAMILIES,
    blocks_of,
    family_named,
    identity_of,
    model_type_of,
    projections_of,
)
from tests.helpers import logits_of, tiny_model, tiny_tokens

every_family = pytest.mark.parametrize("family", FAMILIES)


def recorded_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what each projection receives in one pass, in the order of the calls."""
    inputs: dict[str, torch.Tensor] = {}
    names = {linear: name for name, linear in projections_of(model).items()}
    for linear in names:
        linear.register_forward_pre_hook(
            lambda module, args: inputs.update({names[module]: args[0]})
        )
    logits_of(model, tiny_tokens(1, 12))
    return inputs


@every_family
def test_projections_are_all_linear_layers_of_the_blocks(family: str) -> None:
    model = tiny_model(family)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }
    assert projections_of(model) == linears


@every_family
def test_projections_are_listed_in_the_order_of_the_forward_pass(family: str) -> None:
    model = tiny_model(family)
    assert list(projections_of(model)) == list(recorded_inputs(model))


@every_family
def test_projections_of_one_input_receive_the_same_tensor(family: str) -> None:
    model = tiny_model(family)
    inputs = recorded_inputs(model)
    distinct = [names for block in blocks_of(model) for names in block.inputs.values()]
    tensors = [{id(inputs[name]) for name in names} for names in distinct]
    assert all(len(shared) == 1 for shared in tensors)
    assert len(set.union(*tensors)) == len(distinct) == 8


@every_family
def test_names_in_a_block_are_those_of_the_model(family: str) -> None:
    model = tiny_model(family)
    blocks = blocks_of(model)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    for block in blocks:
        assert model.get_submodule(block.name) is block.module
        assert model.get_submodule(block.attention_name) is block.attention
        for name in block.projections:
            inside = any(model.get_submodule(name) is part for part in block.attention.modules())
            assert block.in_attention(name) is inside
        assert all(name.startswith(f"{block.name}.") for name in block.inputs)


@every_family
def test_identity_holds_type_and_shapes_of_the_model(family: str) -> None:
    model = tiny_model(family)
    identity = identity_of(model)
    assert identity.model_type == family
    for name, (in_features, out_features) in identity.shapes.items():
        assert model.get_submodule(name).weight.shape == (out_features, in_features)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_shapes_show_grouped_heads_and_fused_projections(family: str) -> None:
    shapes = list(identity_of(tiny_model(family)).shapes.values())
    seven = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    fused = [(32, 64), (32, 32), (32, 96), (48, 32)]
    assert shapes == 2 * (fused if family == "phi3" else seven)


def test_families_are_sorted() -> None:
    assert list(FAMILIES) == sorted(FAMILIES)


def test_unsupported_model_type_is_refused_with_all_supported() -> None:
    with pytest.raises(UserError, match=r"'gpt2' is not supported\. Supported: gemma2, .*docs"):
        family_named("gpt2")


def test_module_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"^Linear is not a Hugging Face causal .* Open one with"):
        model_type_of(nn.Linear(2, 2))


def test_projection_that_is_no_linear_layer_is_refused() -> None:
    model = tiny_model("llama")
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Identity())
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj is a Identity, .* Load the"):
        identity_of(model)
