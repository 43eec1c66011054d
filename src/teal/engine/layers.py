"""One decoder layer: the arguments of its five calls, made once, and the calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from teal.engine.weights.decoder_weights import LayerWeights
from teal.engine.weights.matrix import KEEP_ALL, Matrix, fold_shift, gated, parts, weight_rows
from teal.foundation.errors import UserError
from teal.kernels.reference.matmul import rms_norm
from teal.methods import MaskRule
from teal.models.architectures import Architecture, ProjectionInput

Rules = Mapping[str, MaskRule | None]
Observer = Callable[[str, Tensor], None]
Attention = Callable[..., Tensor]
# What `parts` and `gated` are given between `x` and the rest: weight, thresholds,
# output sizes or activation, score_scale, shift, bias.
Product = tuple[Matrix, list[float], Any, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LayerCalls:
    """What the five calls of one layer are given beside their input.

    Attributes:
        names: Full names of the four inputs of projections, in order.
        qkv: Products of q, k and v.
        o: Output projection of attention.
        gate_up: Products of gate and up.
        down: Last projection of the MLP.
        attend: Options of `attend`.
        norms: Gains of the norms before attention and before the MLP.
        post_norms: Gains of the norms after attention and after the MLP.
        vector_norms: Gains of norms over the whole of q and of k.
        eps: Of every norm.
        residual_multiplier: Multiplies what is added to the hidden states.
    """

    names: tuple[str, ...]
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    attend: Mapping[str, Any]
    norms: tuple[Tensor | None, Tensor | None]
    post_norms: tuple[Tensor | None, Tensor | None]
    vector_norms: tuple[Tensor, Tensor] | None
    eps: float
    residual_multiplier: float

    @classmethod
    def of(cls, architecture: Architecture, layer: int, weights: LayerWeights) -> "LayerCalls":
        """Collect what a dense layer is given.

        Args:
            architecture: Of the model.
            layer: Index of the layer.
            weights: Its weights.
        """
        w, eps, activation = weights, architecture.eps, architecture.activation
        inputs = architecture.inputs(layer)
        qkv_sizes = [architecture.q_size, architecture.kv_size, architecture.kv_size]
        hidden = [architecture.hidden_size]
        per_head = architecture.form.qk_norm == "head"
        return cls(
            names=tuple(entry.name for entry in inputs),
            qkv=(w.qkv, [KEEP_ALL] * 3, qkv_sizes, None, None, w.qkv_bias),
            o=(w.o, [KEEP_ALL], hidden, None, None, w.o_bias),
            gate_up=(w.gate_up, [KEEP_ALL] * 2, activation, None, None, w.gate_up_bias),
            down=(w.down, [KEEP_ALL], hidden, None, None, w.down_bias),
            attend={
                "scale": architecture.attention_scale,
                "window": architecture.windows[layer],
                "softcap": architecture.attention_softcap,
                "q_norm_weight": w.q_norm if per_head else None,
                "k_norm_weight": w.k_norm if per_head else None,
                "eps": eps,
            },
            norms=(w.attention_norm, w.mlp_norm),
            post_norms=(w.attention_post_norm, w.mlp_post_norm),
            vector_norms=_vector_norms(architecture, w),
            eps=eps,
            residual_multiplier=architecture.residual_multiplier,
        )

    def with_rules(
        self, inputs: Sequence[ProjectionInput], rules: Rules, dtype: torch.dtype
    ) -> "LayerCalls":
        """Return the calls of the same layer, which drop what the rules say.

        Args:
            inputs: The four inputs of the layer.
            rules: By full projection name; what is not named stays dense.
            dtype: Of the hidden states.

        Raises:
            UserError: Rules of projections that share an input centre it differently.
        """
        calls = (self.qkv, self.o, self.gate_up, self.down)
        qkv, o, gate_up, down = (
            _with_rules(call, [rules.get(name) for name in entry.output_sizes], entry.name, dtype)
            for call, entry in zip(calls, inputs, strict=True)
        )
        return replace(self, qkv=qkv, o=o, gate_up=gate_up, down=down)


def run_layer(
    hidden: Tensor,
    calls: LayerCalls,
    attend: Attention,
    cache: tuple[Tensor, ...],
    observer: Observer | None,
) -> Tensor:
    """Bring hidden states through one layer.

    Args:
        hidden: Hidden states, (T, hidden_size).
        calls: What its calls are given.
        attend: `kernels.ops.attend` for one token of each of T streams, or `attend_many` for T
            tokens of one stream.
        cache: Its arguments between `qkv` and the options: keys, values, positions, cosines, sines.
        observer: Told the input of each projection.

    Returns:
        Hidden states, (T, hidden_size).
    """
    if observer:
        observer(calls.names[0], _normed(hidden, calls.norms[0], calls.eps))
    qkv = parts(hidden, *calls.qkv, None, calls.norms[0], calls.eps)
    if calls.vector_norms:
        qkv = _norm_vectors(qkv, calls.vector_norms, calls.eps)
    attended = attend(qkv, *cache, **calls.attend)
    if observer:
        observer(calls.names[1], attended)
    hidden = _add(hidden, attended, calls.o, calls.post_norms[0], calls)
    if observer:
        observer(calls.names[2], _normed(hidden, calls.norms[1], calls.eps))
    inner = gated(hidden, *calls.gate_up, calls.norms[1], calls.eps)
    if observer:
        observer(calls.names[3], inner)
    return _add(hidden, inner, calls.down, calls.post_norms[1], calls)


def _add(
    hidden: Tensor, x: Tensor, call: Product, post_norm: Tensor | None, calls: LayerCalls
) -> Tensor:
    """Return `hidden` and the projection of `x` together."""
    if post_norm is None and calls.residual_multiplier == 1.0:
        return parts(x, *call, hidden)
    added = _normed(parts(x, *call), post_norm, calls.eps)
    return hidden + added * calls.residual_multiplier


def _normed(x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    return x if norm_weight is None else rms_norm(x, norm_weight, eps)


def _norm_vectors(qkv: Tensor, norm_weights: tuple[Tensor, Tensor], eps: float) -> Tensor:
    q_size, kv_size = len(norm_weights[0]), len(norm_weights[1])
    q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
    return torch.cat(
        [rms_norm(q, norm_weights[0], eps), rms_norm(k, norm_weights[1], eps), v], dim=-1
    )


def _vector_norms(architecture: Architecture, w: LayerWeights) -> tuple[Tensor, Tensor] | None:
    if architecture.form.qk_norm != "vector" or w.q_norm is None or w.k_norm is None:
        return None
    return w.q_norm, w.k_norm


def _with_rules(
    call: Product, rules: Sequence[MaskRule | None], name: str, dtype: torch.dtype
) -> Product:
    weight, thresholds, columns, _, _, bias = call
    if not any(rules):
        return call
    if len(rules) < len(thresholds):
        # The checkpoint has one projection where the product has several parts.
        rules = list(rules) * len(thresholds)
    shift = _shift(rules, weight_rows(weight), name)
    return (
        weight,
        [rule.threshold if rule else KEEP_ALL for rule in rules],
        columns,
        _scales(rules, weight_rows(weight)),
        shift,
        bias if shift is None else fold_shift(weight, shift, bias, dtype),
    )


def _scales(rules: Sequence[MaskRule | None], weight_rows: Tensor) -> Tensor | None:
    """Return the score weights of all parts, (parts, in_features), float32."""
    scales = [rule.score_scale if rule else None for rule in rules]
    if all(score_scale is None for score_scale in scales):
        return None
    ones = torch.ones(len(weight_rows), device=weight_rows.device)
    return torch.stack(
        [ones if score_scale is None else score_scale.to(ones) for score_scale in scales]
    )


def _shift(rules: Sequence[MaskRule | None], weight_rows: Tensor, name: str) -> Tensor | None:
    """Return the centre that all rules of an input share, (in_features,), float32."""
    shifts = [rule.shift for rule in rules if rule]
    given = [shift for shift in shifts if shift is not None]
    if not given:
        return None
    if len(given) < len(shifts) or not all(torch.equal(given[0], shift) for shift in given):
        raise UserError(
            f"The rules of projections that read {name} have different shifts, and the engine "
            "centres an input once. Make a plan with one shift per input."
        )
    return given[0].to(weight_rows.device, torch.float32)
