from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of
from teal.models.families import FAMILIES, identity_of
from tests.helpers import ENGINE_FAMILIES, plan_for, tiny_model

every_family = pytest.mark.parametrize("family", ENGINE_FAMILIES)


@every_family
def test_identity_is_that_of_the_model(family: str) -> None:
    model = tiny_model(family)
    identity = architecture_of(model.config).identity
    assert identity == identity_of(model)
    assert list(identity.shapes) == list(identity_of(model).shapes)


def test_plan_of_another_model_does_not_fit_the_architecture() -> None:
    plan = plan_for(tiny_model("llama"), 0.5)
    wide = architecture_of(tiny_model("llama", intermediate_size=64).config)
    plan.model.require(architecture_of(tiny_model("llama").config).identity, "plan")
    with pytest.raises(UserError, match=r"^The plan belongs to another model: .*32→48 here, 32→64"):
        plan.model.require(wide.identity, "plan")


def test_weights_of_a_7b_model_are_counted_from_its_configuration() -> None:
    assert architecture_of(AutoConfig.for_model("llama")).num_weights == 6_738_149_376


@every_family
def test_layers_have_four_inputs_under_the_names_that_calibration_uses(family: str) -> None:
    architecture = architecture_of(tiny_model(family).config)
    names = [entry.name for entry in architecture.inputs(1)]
    keys = ("attention_input", "o_input", "mlp_input", "down_input")
    assert names == [f"model.layers.1.{key}" for key in keys]


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_number_of_weights_equals_that_of_the_model(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    architecture = architecture_of(model.config)
    assert architecture.tied_head is tied
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert architecture.num_weights == sum(matrix.numel() for matrix in matrices)


@every_family
@pytest.mark.parametrize("asked", [False, True])
def test_biases_are_where_the_model_has_them(family: str, asked: bool) -> None:
    known = vars(tiny_model(family).config)
    fields = [field for field in ("attention_bias", "mlp_bias") if field in known]
    model = tiny_model(family, **dict.fromkeys(fields, asked))
    architecture = architecture_of(model.config)
    biased = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    expected = (architecture.qkv_bias, architecture.o_bias, architecture.mlp_bias)
    projections = ("q", "o", "up") if family != "phi3" else ("qkv", "o", "gate_up")
    for flag, projection in zip(expected, projections, strict=True):
        assert any(f".{projection}_proj.bias" in name for name in biased) is flag


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, (0, 0)),
        ("mistral", {}, (5, 5)),
        ("mistral", {"sliding_window": None}, (0, 0)),
        ("phi3", {}, (5, 5)),
        ("qwen2", {}, (5, 0)),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}, (0, 0)),
        ("gemma2", {}, (5, 0)),
    ],
)
def test_windows_follow_the_kind_of_layer(
    family: str, changes: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert architecture_of(tiny_model(family, **changes).config).windows == windows


def test_gemma_takes_its_scale_and_caps_from_the_configuration() -> None:
    changes = {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 20.0}
    architecture = architecture_of(tiny_model("gemma2", **changes).config)
    assert architecture.attention_scale == 0.125
    assert (architecture.attention_softcap, architecture.logit_softcap) == (20.0, 30.0)
    assert architecture.embedding_multiplier == 32**0.5
    assert architecture.activation == "gelu_pytorch_tanh"


def test_granite_takes_its_multipliers_from_the_configuration() -> None:
    multipliers = {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.25,
    }
    architecture = architecture_of(tiny_model("granite", **multipliers).config)
    found = (
        architecture.attention_scale,
        architecture.embedding_multiplier,
        architecture.logit_divisor,
        architecture.residual_multiplier,
    )
    assert found == tuple(multipliers.values())


def test_family_that_only_transformers_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], form=None))
    with pytest.raises(UserError, match=r"a layer of 'llama' computes\. Run the model with"):
        architecture_of(tiny_model("llama").config)


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        ("llama", "hidden_act", "relu", r"'relu', .* Supported: gelu_pytorch_tanh, silu\. Run"),
        ("qwen2", "layer_types", ["full_attention", "linear_attention"], r"type 'linear_att.* Run"),
        ("gemma3_text", "use_bidirectional_attention", True, r"later tokens .* Give a causal"),
    ],
)
def test_unsupported_configurations_are_refused(
    family: str, field: str, value: object, message: str
) -> None:
    config = tiny_model(family).config
    setattr(config, field, value)
    with pytest.raises(UserError, match=message):
        architecture_of(config)
