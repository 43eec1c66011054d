"""The table of model families: where the projections are and what a layer computes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity

SEVEN_PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_input": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "down_input": ("mlp.down_proj",),
}
FUSED_PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "attention_input": ("self_attn.qkv_proj",),
    "o_input": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_up_proj",),
    "down_input": ("mlp.down_proj",),
}


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """The parts of a decoder layer besides projections that the model type alone decides.

    Norms are named relative to the layer; `None` means that the layer has no such norm.

    Attributes:
        attention_norm: RMSNorm on the input of attention.
        mlp_norm: RMSNorm on the input of the MLP.
        attention_post_norm: RMSNorm on the output of attention, before the residual is added.
        mlp_post_norm: RMSNorm on the output of the MLP, before the residual is added.
        norm_offset: Number added to the weight of every RMSNorm.
        qk_norm: RMSNorm on q and k: "none", per "head", or over the whole "vector".
        qkv_bias: Whether q, k and v have a bias regardless of the configuration.
        embedding_scaled: Whether embeddings are multiplied by the square root of hidden_size.
    """

    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm_offset: float = 0.0
    qk_norm: Literal["none", "head", "vector"] = "none"
    qkv_bias: bool = False
    embedding_scaled: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names and structure of the models of one Hugging Face model type.

    Attributes:
        inputs: Projections by the input that they share, named relative to the block, in the
            order of the forward pass.
        blocks: Dotted name of the list of blocks.
        attention: Name of the attention module, relative to the block.
        form: Structure of a layer for the engine, or `None` if only transformers runs the type.
    """

    inputs: Mapping[str, tuple[str, ...]]
    blocks: str = "model.layers"
    attention: str = "self_attn"
    form: LayerForm | None = None


PRE_NORM = LayerForm()
_GEMMA = LayerForm(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    embedding_scaled=True,
)
_OLMO2 = LayerForm(
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    qk_norm="vector",
)

FAMILIES: dict[str, Family] = {
    "gemma2": Family(inputs=SEVEN_PROJECTIONS, form=_GEMMA),
    "gemma3_text": Family(inputs=SEVEN_PROJECTIONS, form=replace(_GEMMA, qk_norm="head")),
    "granite": Family(inputs=SEVEN_PROJECTIONS, form=PRE_NORM),
    "llama": Family(inputs=SEVEN_PROJECTIONS, form=PRE_NORM),
    "mistral": Family(inputs=SEVEN_PROJECTIONS, form=PRE_NORM),
    "olmo2": Family(inputs=SEVEN_PROJECTIONS, form=_OLMO2),
    "phi3": Family(inputs=FUSED_PROJECTIONS, form=PRE_NORM),
    "qwen2": Family(inputs=SEVEN_PROJECTIONS, form=replace(PRE_NORM, qkv_bias=True)),
    "qwen3": Family(inputs=SEVEN_PROJECTIONS, form=replace(PRE_NORM, qk_norm="head")),
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder layer of a model.

    Attributes:
        name: Dotted module name, such as "model.layers.3".
        module: The layer.
        attention: Attention module of the layer.
        attention_name: Dotted name of the attention module.
        inputs: Full projection names by full input name, such as
            "model.layers.3.mlp_input" → ("model.layers.3.mlp.gate_proj", …).
    """

    name: str
    module: nn.Module
    attention: nn.Module
    attention_name: str
    inputs: Mapping[str, tuple[str, ...]]

    @property
    def projections(self) -> tuple[str, ...]:
        """Full names of all projections, in the order of the forward pass."""
        return tuple(name for names in self.inputs.values() for name in names)

    def in_attention(self, projection: str) -> bool:
        """Tell whether a projection, by full name, belongs to the attention module."""
        return projection.startswith(f"{self.attention_name}.")


def family_named(model_type: str) -> Family:
    """Return the family of a Hugging Face model type.

    Raises:
        UserError: The type is not in the table.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"Model type {model_type!r} is not supported. Supported: {', '.join(FAMILIES)}. "
            "To add one, see docs/extending.md."
        )
    return FAMILIES[model_type]


def model_type_of(model: nn.Module) -> str:
    """Return the Hugging Face model type of `model`.

    Raises:
        UserError: The model has no Hugging Face configuration.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UserError(
            f"{type(model).__name__} is not a Hugging Face causal language model. "
            "Open one with AutoModelForCausalLM.from_pretrained."
        )
    return str(model_type)


def blocks_of(model: nn.Module) -> list[Block]:
    """List the decoder layers of `model` in order.

    Raises:
        UserError: The model type is not supported.
    """
    return list(_blocks(model, family_named(model_type_of(model))))


def projections_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every projection by its dotted module name, in the order of the forward pass.

    Raises:
        UserError: The model type is not supported, or a projection is not a linear layer.
    """
    return {name: _linear(model, name) for block in blocks_of(model) for name in block.projections}


def identity_of(model: nn.Module) -> ModelIdentity:
    """Return the identity of `model`, which its plans and statistics must match."""
    return ModelIdentity(
        model_type=model_type_of(model),
        shapes={
            name: (linear.in_features, linear.out_features)
            for name, linear in projections_of(model).items()
        },
    )


def _blocks(model: nn.Module, family: Family) -> Iterator[Block]:
    modules: Iterator[tuple[str, nn.Module]] = model.get_submodule(family.blocks).named_children()
    for index, module in modules:
        name = f"{family.blocks}.{index}"
        yield Block(
            name=name,
            module=module,
            attention=module.get_submodule(family.attention),
            attention_name=f"{name}.{family.attention}",
            inputs={
                f"{name}.{key}": tuple(f"{name}.{projection}" for projection in projections)
                for key, projections in family.inputs.items()
            },
        )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UserError(
            f"{name} is a {type(module).__name__}, not a linear layer. "
            "Load the model without quantization."
        )
    return module
