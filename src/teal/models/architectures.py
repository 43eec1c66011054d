"""The structure of a model as a decoder needs it: sizes, norms, rope, windows, multipliers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.kernels.reference.matmul import GATES
from teal.models.families import Family, LayerForm, family_named
from teal.models.loading import context_length
from teal.models.rope import Rope, ropes_of

_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class ProjectionInput:
    """An input of a layer's projections, and the projections that share it.

    Attributes:
        name: Full name, such as "model.layers.3.mlp_input".
        in_features: Number of input channels.
        output_sizes: out_features by full projection name, in the order of the forward pass.
    """

    name: str
    in_features: int
    output_sizes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only Transformer with gated MLPs, as the engine runs it.

    Attributes:
        model_type: Hugging Face model type, such as "llama".
        family: Row of the family table: names of projections and norms.
        vocab_size: Number of token ids.
        hidden_size: Channels of the hidden states.
        intermediate_size: Channels inside the MLP.
        num_layers: Number of decoder layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Channels per head.
        eps: Added to the mean square in every RMSNorm.
        activation: Activation function of the gate, "silu" or "gelu_pytorch_tanh".
        attention_scale: Factor on the dot products of queries and keys.
        attention_softcap: Soft cap on attention scores; 0 for none.
        logit_softcap: Soft cap on logits; 0 for none.
        embedding_multiplier: Factor on the embeddings.
        residual_multiplier: Factor on the outputs of attention and MLP before they are added to
            the hidden states.
        logit_divisor: Divisor of the logits.
        qkv_bias: Whether q, k and v have a bias.
        o_bias: Whether the output projection of attention has a bias.
        mlp_bias: Whether the projections of the MLP have a bias.
        windows: Attention window of each layer in tokens; 0 for full attention.
        ropes: Rotary embedding of each layer.
        tied_head: Whether the output head shares its weight with the embedding.
        max_context: Longest sequence that the model was trained for, in tokens.
    """

    model_type: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    embedding_multiplier: float
    residual_multiplier: float
    logit_divisor: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    tied_head: bool
    max_context: int

    @property
    def form(self) -> LayerForm:
        """Norms, biases and scaling of a layer."""
        assert self.family.form is not None
        return self.family.form

    @property
    def q_size(self) -> int:
        """Output channels of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output channels of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def num_weights(self) -> int:
        """Number of weights in all matrices, without the small norms and biases."""
        identity = self.identity
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return embeddings + sum(map(identity.weight_size, identity.shapes))

    @property
    def identity(self) -> ModelIdentity:
        """Identity that plans must match; equal to that of the Hugging Face model."""
        inputs = [entry for layer in range(self.num_layers) for entry in self.inputs(layer)]
        return ModelIdentity(
            model_type=self.model_type,
            shapes={
                projection: (entry.in_features, size)
                for entry in inputs
                for projection, size in entry.output_sizes.items()
            },
        )

    def layer_name(self, layer: int) -> str:
        """Return the full name of a layer, such as "model.layers.3"."""
        return f"{self.family.blocks}.{layer}"

    def inputs(self, layer: int) -> tuple[ProjectionInput, ...]:
        """Return the inputs of a layer's projections, in the order of the forward pass.

        Args:
            layer: Index of the layer.

        Returns:
            Four inputs: of q, k and v; of the output projection; of gate and up; of down.
        """
        prefix = self.layer_name(layer)
        in_features = (self.hidden_size, self.q_size, self.hidden_size, self.intermediate_size)
        return tuple(
            ProjectionInput(
                name=f"{prefix}.{key}",
                in_features=size,
                output_sizes={f"{prefix}.{name}": self._output_size(name) for name in projections},
            )
            for size, (key, projections) in zip(
                in_features, self.family.inputs.items(), strict=True
            )
        )

    def _output_size(self, projection: str) -> int:
        return {
            "q_proj": self.q_size,
            "k_proj": self.kv_size,
            "v_proj": self.kv_size,
            "qkv_proj": self.q_size + 2 * self.kv_size,
            "o_proj": self.hidden_size,
            "gate_proj": self.intermediate_size,
            "up_proj": self.intermediate_size,
            "gate_up_proj": 2 * self.intermediate_size,
            "down_proj": self.hidden_size,
        }[projection.rpartition(".")[2]]


def architecture_of(config: Any) -> Architecture:
    """Read the architecture of a model from its Hugging Face configuration.

    Args:
        config: Hugging Face configuration, as `AutoConfig` opens it.

    Raises:
        UserError: The engine does not support what the configuration asks for.
    """
    family = family_named(config.model_type)
    form = _require_form(config, family)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer_types = _layer_types(config)
    attention_bias = bool(getattr(config, "attention_bias", False))
    return Architecture(
        model_type=config.model_type,
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        activation=_activation(config),
        attention_scale=_attention_scale(config, head_dim),
        attention_softcap=_number(config, "attn_logit_softcapping", 0.0),
        logit_softcap=_number(config, "final_logit_softcapping", 0.0),
        embedding_multiplier=config.hidden_size**0.5
        if form.embedding_scaled
        else _number(config, "embedding_multiplier", 1.0),
        residual_multiplier=_number(config, "residual_multiplier", 1.0),
        logit_divisor=_number(config, "logits_scaling", 1.0),
        qkv_bias=form.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        windows=_windows(config, layer_types),
        ropes=ropes_of(config, layer_types),
        tied_head=bool(config.tie_word_embeddings),
        max_context=context_length(config),
    )


def _require_form(config: Any, family: Family) -> LayerForm:
    if family.form is None:
        raise UserError(
            f"The engine does not know what a layer of {config.model_type!r} computes. Run the "
            "model with transformers, or give its family a form: see docs/extending.md."
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(
            "This model attends to later tokens too, so it cannot generate. Give a causal model."
        )
    return family.form


def _activation(config: Any) -> str:
    # Gemma configurations have both fields; transformers reads hidden_activation.
    name = str(getattr(config, "hidden_activation", None) or config.hidden_act)
    if name not in GATES:
        raise UserError(
            f"The activation of this model is {name!r}, which the engine does not compute. "
            f"Supported: {', '.join(GATES)}. Run the model with transformers."
        )
    return name


def _attention_scale(config: Any, head_dim: int) -> float:
    default = _number(config, "query_pre_attn_scalar", head_dim) ** -0.5
    return _number(config, "attention_multiplier", default)


def _layer_types(config: Any) -> tuple[str, ...]:
    sliding = getattr(config, "sliding_window", None) is not None
    default = [_LAYER_TYPES[sliding]] * config.num_hidden_layers
    types = tuple(getattr(config, "layer_types", None) or default)
    unknown = set(types) - set(_LAYER_TYPES)
    if unknown:
        raise UserError(
            f"This model has layers of type {min(unknown)!r}, which the engine does not compute. "
            f"Supported: {', '.join(_LAYER_TYPES)}. Run the model with transformers."
        )
    return types


def _windows(config: Any, layer_types: tuple[str, ...]) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def _number(config: Any, field: str, default: float) -> float:
    value = getattr(config, field, None)
    return default if value is None else float(value)
