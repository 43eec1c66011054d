"""One decoder layer: its projections and attention options, prepared once, and its forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from teal.engine.projection import ProjectionCall
from teal.engine.weights.decoder_weights import LayerWeights
from teal.engine.weights.matrix import KEEP_ALL, Matrix
from teal.kernels.reference.matmul import rms_norm
from teal.methods import MaskRule
from teal.models.architectures import Architecture, ProjectionInput

Rules = Mapping[str, MaskRule | None]
Observer = Callable[[str, Tensor], None]
# Keys, values, positions, cosines and sines of one layer.
CacheEntry = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class AttentionOptions(TypedDict):
    """Keyword arguments of `kernels.ops.attend` that are fixed per layer."""

    scale: float
    window: int
    softcap: float
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    eps: float


class Attention(Protocol):
    """Appends tokens to the cache and attends from them; see `kernels.ops.attend`."""

    def __call__(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        cosines: Tensor,
        sines: Tensor,
        **options: Unpack[AttentionOptions],
    ) -> Tensor:
        """Return the attention output, (T, heads · head_dim)."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LayerCalls:
    """The calls of one layer.

    Attributes:
        names: Full names of the four projection inputs, in the order of the forward pass.
        qkv: Projections to queries, keys and values.
        o: Output projection of attention.
        gate_up: Gate and up projection of the MLP with the activation.
        down: Output projection of the MLP.
        attention: Options of attention.
        post_norms: Weights of the RMSNorms behind attention and behind the MLP, (hidden_size,).
        vector_norms: Weights of the RMSNorms over all of q and all of k, (heads · head_dim,) and
            (kv_heads · head_dim,).
        eps: Added to the mean square in every norm.
        residual_multiplier: Factor of what is added to the hidden states.
    """

    names: tuple[str, ...]
    qkv: ProjectionCall
    o: ProjectionCall
    gate_up: ProjectionCall
    down: ProjectionCall
    attention: AttentionOptions
    post_norms: tuple[Tensor | None, Tensor | None]
    vector_norms: tuple[Tensor, Tensor] | None
    eps: float
    residual_multiplier: float

    @property
    def projections(self) -> tuple[ProjectionCall, ProjectionCall, ProjectionCall, ProjectionCall]:
        """The calls in the order of `Architecture.inputs`."""
        return self.qkv, self.o, self.gate_up, self.down

    def with_rules(
        self, inputs: tuple[ProjectionInput, ...], rules: Rules, dtype: torch.dtype
    ) -> "LayerCalls":
        """Return the calls of the same layer with activations dropped by rules.

        Args:
            inputs: The four projection inputs of the layer.
            rules: Rules by full projection name; a projection without one stays dense.
            dtype: Dtype of the hidden states.

        Raises:
            UserError: Rules of projections that share an input have different shifts.
        """
        qkv, o, gate_up, down = (
            call.with_rules([rules.get(name) for name in entry.output_sizes], entry.name, dtype)
            for call, entry in zip(self.projections, inputs, strict=True)
        )
        return replace(self, qkv=qkv, o=o, gate_up=gate_up, down=down)


def dense_calls(
    architecture: Architecture, layer: int, weights: LayerWeights, tuning: str = ""
) -> LayerCalls:
    """Prepare the calls of a dense layer.

    Args:
        architecture: Architecture of the model.
        layer: Index of the layer.
        weights: Weights of the layer.
        tuning: Folder of tuning tables, "" for the tables that the package ships.
    """
    w, a = weights, architecture
    is_per_head = a.form.qk_norm == "head"
    return LayerCalls(
        names=tuple(entry.name for entry in a.inputs(layer)),
        qkv=ProjectionCall(
            weight=w.qkv,
            thresholds=(KEEP_ALL,) * 3,
            output_sizes=(a.q_size, a.kv_size, a.kv_size),
            bias=w.qkv_bias,
            norm_weight=w.attention_norm,
            eps=a.eps,
            tuning=tuning,
        ),
        o=_output_projection(w.o, w.o_bias, a, tuning),
        gate_up=ProjectionCall(
            weight=w.gate_up,
            thresholds=(KEEP_ALL,) * 2,
            output_sizes=(a.intermediate_size,) * 2,
            activation=a.activation,
            bias=w.gate_up_bias,
            norm_weight=w.mlp_norm,
            eps=a.eps,
            tuning=tuning,
        ),
        down=_output_projection(w.down, w.down_bias, a, tuning),
        attention={
            "scale": a.attention_scale,
            "window": a.windows[layer],
            "softcap": a.attention_softcap,
            "q_norm_weight": w.q_norm if is_per_head else None,
            "k_norm_weight": w.k_norm if is_per_head else None,
            "eps": a.eps,
        },
        post_norms=(w.attention_post_norm, w.mlp_post_norm),
        vector_norms=_vector_norms(a, w),
        eps=a.eps,
        residual_multiplier=a.residual_multiplier,
    )


def run_layer(
    hidden: Tensor,
    calls: LayerCalls,
    attend: Attention,
    cache: CacheEntry,
    observer: Observer | None,
) -> Tensor:
    """Run hidden states through one layer.

    Args:
        hidden: Hidden states, (T, hidden_size).
        calls: The calls of the layer.
        attend: `kernels.ops.attend` for one token of each of T sequences, or `attend_many` for T
            tokens of one sequence.
        cache: Keys, values, positions, cosines and sines, as `attend` takes them.
        observer: Told the name and the value of each projection input.

    Returns:
        Hidden states, (T, hidden_size).
    """
    if observer:
        observer(calls.names[0], _normed(hidden, calls.qkv.norm_weight, calls.eps))
    qkv = calls.qkv(hidden)
    if calls.vector_norms:
        qkv = _norm_vectors(qkv, calls.vector_norms, calls.eps)
    attended = attend(qkv, *cache, **calls.attention)
    if observer:
        observer(calls.names[1], attended)
    hidden = _add(hidden, attended, calls.o, calls.post_norms[0], calls)
    if observer:
        observer(calls.names[2], _normed(hidden, calls.gate_up.norm_weight, calls.eps))
    inner = calls.gate_up(hidden)
    if observer:
        observer(calls.names[3], inner)
    return _add(hidden, inner, calls.down, calls.post_norms[1], calls)


def _add(
    hidden: Tensor, x: Tensor, project: ProjectionCall, post_norm: Tensor | None, calls: LayerCalls
) -> Tensor:
    """Return the sum of `hidden` and the projection of `x`."""
    if post_norm is None and calls.residual_multiplier == 1.0:
        return project(x, hidden)
    added = _normed(project(x), post_norm, calls.eps)
    return hidden + added * calls.residual_multiplier


def _normed(x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    return x if norm_weight is None else rms_norm(x, norm_weight, eps)


def _norm_vectors(qkv: Tensor, norm_weights: tuple[Tensor, Tensor], eps: float) -> Tensor:
    q_size, kv_size = len(norm_weights[0]), len(norm_weights[1])
    q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
    return torch.cat(
        [rms_norm(q, norm_weights[0], eps), rms_norm(k, norm_weights[1], eps), v], dim=-1
    )


def _output_projection(
    weight: Matrix, bias: Tensor | None, architecture: Architecture, tuning: str
) -> ProjectionCall:
    return ProjectionCall(
        weight=weight,
        thresholds=(KEEP_ALL,),
        output_sizes=(architecture.hidden_size,),
        bias=bias,
        tuning=tuning,
    )


def _vector_norms(architecture: Architecture, w: LayerWeights) -> tuple[Tensor, Tensor] | None:
    if architecture.form.qk_norm != "vector" or w.q_norm is None or w.k_norm is None:
        return None
    return w.q_norm, w.k_norm
