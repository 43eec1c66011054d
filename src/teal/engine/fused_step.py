"""The decode step of one sequence on a GPU, in five launches per layer.

`Decoder.step` rounds every sum to the dtype of the activations before the next operation reads it.
This step passes sums on in fixed point, compacts the kept channels where they are used, and lets
each launch begin before its predecessor has ended.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.engine.decoder import Decoder, Stepper
from teal.engine.kv_cache import KeyValueCache
from teal.engine.layers import LayerCalls
from teal.engine.projection import ProjectionCall
from teal.engine.weights.matrix import Matrix
from teal.kernels.operands import QuantParams, padded_thresholds

try:
    from teal.kernels.cuda import attention as cuda_attention
    from teal.kernels.cuda import decode_step, embed_argmax, nvrtc, tile_config
except ImportError:
    decode_step = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

# The first compute capability with bfloat16.
_AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """Fixed arguments of the launches of one layer.

    Attributes:
        qkv: Projections to queries, keys and values.
        o: Output projection of attention.
        gate_up: Gate and up projection of the MLP.
        down: Output projection of the MLP.
        attention: Options of attention.
    """

    qkv: "decode_step.Projections"
    o: "decode_step.Projections"
    gate_up: "decode_step.Projections"
    down: "decode_step.Projections"
    attention: "cuda_attention.Attention"


class FusedStep:
    """Computes the decode steps of one sequence; a `Stepper`.

    Args:
        decoder: Decoder with its rules set; later changes of the rules have no effect.
        cache: Cache of one sequence.
        overlap: Let launches begin before their predecessor has ended, if the GPU can.
        configs: Tile configurations of "qkv", "o", "gate_up" or "down"; by default those of the
            tuning tables.

    Attributes:
        memory: Sums of a step.
        layers: Fixed arguments of the launches of each layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KeyValueCache,
        *,
        overlap: bool = True,
        configs: "Mapping[str, tile_config.TileConfig] | None" = None,
    ) -> None:
        architecture, weights = decoder.architecture, decoder.weights
        self._decoder = decoder
        self._dependent = overlap and nvrtc.has_clusters(weights.device)
        splits = cuda_attention.splits_for(cache.capacity)
        self.memory = decode_step.StepMemory(
            architecture.hidden_size,
            architecture.q_size + 2 * architecture.kv_size,
            architecture.intermediate_size,
            (architecture.heads, splits, architecture.head_dim),
            weights.dtype,
            weights.device,
        )
        self.layers = [_layer(decoder, calls, configs or {}) for calls in decoder.layers]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append a token to the sequence; see `Decoder.step`."""
        with torch.cuda.device(self.memory.hidden.device):
            return self._step(tokens, cache)

    def _step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        memory, dependent, decoder = self.memory, self._dependent, self._decoder
        entries = zip(cache.keys, cache.values, cache.cosines, cache.sines, strict=False)
        embed_argmax.embed(
            tokens,
            decoder.weights.embedding,
            memory,
            decoder.embedding_multiplier,
            dependent=dependent,
        )
        for index, (layer, entry) in enumerate(zip(self.layers, entries, strict=True)):
            self._attend(layer, cache.positions, entry)
            self._feed_forward(layer, index)
        embed_argmax.final_norm(
            decoder.weights.final_norm,
            decoder.architecture.eps,
            memory,
            cache.positions,
            dependent=dependent,
        )
        return decoder.logits_of(memory.normed)

    def _attend(
        self, layer: Layer, positions: Tensor, entry: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        """Add attention to the residual stream; `entry` is keys, values, cosines and sines."""
        m, dependent = self.memory, self._dependent
        keys, values, cosines, sines = entry
        decode_step.project(layer.qkv, m.hidden, m.qkv, None, m, dependent=dependent)
        cuda_attention.attend(
            layer.attention, keys, values, positions, cosines, sines, m, dependent=dependent
        )
        decode_step.project(layer.o, m.parts, m.hidden, m.qkv, m, dependent=dependent)

    def _feed_forward(self, layer: Layer, index: int) -> None:
        m, dependent = self.memory, self._dependent
        sums, later = m.gate_up[index % 2], m.gate_up[1 - index % 2]
        decode_step.project(layer.gate_up, m.hidden, sums, later, m, dependent=dependent)
        decode_step.project(layer.down, sums, m.hidden, None, m, dependent=dependent)


def stepper_of(decoder: Decoder, cache: KeyValueCache, *, overlap: bool = True) -> Stepper:
    """Return the fastest available decode step.

    Args:
        decoder: Decoder with its rules set.
        cache: Cache of the batch.
        overlap: Let launches of a `FusedStep` begin before their predecessor has ended.
    """
    reason = fused_step_obstacle(decoder, cache)
    if reason is None:
        return FusedStep(decoder, cache, overlap=overlap)
    _log.info("Decoding operation by operation: %s.", reason)
    return decoder.step


def fused_step_obstacle(decoder: Decoder, cache: KeyValueCache) -> str | None:
    """Return why `FusedStep` cannot compute the steps of a decoder, `None` if it can.

    Args:
        decoder: Decoder with its rules set.
        cache: Cache of the batch.
    """
    architecture, device = decoder.architecture, decoder.weights.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _AMPERE:
        return "the weights are not on a GPU of compute capability 8.0 or later"
    if decode_step is None:
        return "NVIDIA's Python bindings are not installed"
    if not nvrtc.can_compile(torch.cuda.get_device_capability(device)):
        return "NVIDIA's run-time compiler is not installed or does not support this GPU"
    dtype, form = decoder.weights.dtype, architecture.form
    sizes = (architecture.hidden_size, architecture.q_size, architecture.intermediate_size)
    heads_fit = cuda_attention.can_attend(
        architecture.heads, architecture.kv_heads, architecture.head_dim, cache.cosines[0]
    )
    projections = [call for calls in decoder.layers for call in calls.projections]
    obstacles = {
        "there is more than one sequence": cache.batch_size > 1,
        "the weights are neither bfloat16 nor float16": dtype not in tile_config.DTYPES,
        f"sizes are not multiples of {decode_step.ALIGNMENT}": any(
            size % decode_step.ALIGNMENT for size in sizes
        ),
        "heads have an unsupported size or partial rotary embedding": not heads_fit,
        "a layer is not normed before attention and MLP only": None
        in (form.attention_norm, form.mlp_norm)
        or form.attention_post_norm is not None
        or form.mlp_post_norm is not None,
        "the norms of q and k span all heads": form.qk_norm == "vector",
        "rules have a score_scale or shift": not all(map(_is_plain, projections)),
        "projections have sizes that vector loads do not divide": not all(
            tile_config.can_load(*_codes_and_params(call.weight), call.output_sizes, dtype)
            for call in projections
        ),
    }
    return next((reason for reason, is_there in obstacles.items() if is_there), None)


def _is_plain(call: ProjectionCall) -> bool:
    return call.score_scale is None and call.shift is None


def _layer(
    decoder: Decoder, calls: LayerCalls, configs: "Mapping[str, tile_config.TileConfig]"
) -> Layer:
    inputs = {
        "qkv": "hidden",
        "o": "attention",
        "gate_up": "hidden",
        "down": decoder.architecture.activation,
    }
    projections = {
        name: _projections(call, source, calls, configs.get(name))
        for (name, source), call in zip(inputs.items(), calls.projections, strict=True)
    }
    return Layer(**projections, attention=cuda_attention.Attention(**calls.attention))


def _projections(
    call: ProjectionCall,
    source: str,
    calls: LayerCalls,
    config: "tile_config.TileConfig | None",
) -> "decode_step.Projections":
    codes, quant = _codes_and_params(call.weight)
    return decode_step.Projections(
        weight=codes,
        quant=quant,
        output_sizes=call.output_sizes,
        thresholds=torch.tensor(padded_thresholds(call.thresholds), device=codes.device),
        input=source,  # type: ignore[arg-type]
        is_dense=call.is_dense,
        bias=call.bias,
        norm_weight=call.norm_weight,
        eps=calls.eps,
        multiplier=1.0 if call.norm_weight is not None else calls.residual_multiplier,
        config=config,
        tuning=call.tuning,
    )


def _codes_and_params(weight: Matrix) -> tuple[Tensor, QuantParams | None]:
    if isinstance(weight, Tensor):
        return weight, None
    return weight.codes, QuantParams(weight.scales, weight.zeros, weight.group_size)
