"""The decode step of one stream on a GPU, in five launches per layer.

Where the general path of `Decoder.step` brings every sum to the activations' dtype before the next
call reads it, this one hands over sums in fixed point, makes the lists of kept channels where they
are used, and lets each launch begin before the one in front has ended.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.engine.decoder import Decoder, Stepper
from teal.engine.kv_cache import KeyValueCache
from teal.engine.layers import LayerCalls, Product
from teal.engine.weights.matrix import Matrix
from teal.kernels.operands import QuantParams
from teal.kernels.reference.matmul import keeps_everything
from teal.models.architectures import Architecture

try:
    from teal.kernels.cuda import attention as cuda_attention
    from teal.kernels.cuda import decode_step, embed_argmax, nvrtc, tile_config
except ImportError:
    decode_step = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

# The first that rounds to bfloat16.
_AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What the launches of one layer are given.

    Attributes:
        qkv: Projections of the attention input.
        o: Projection of what attention gave.
        gate_up: Projections of the MLP input.
        down: Projection of activation(gate) · up.
        attention: What lies between.
    """

    qkv: "decode_step.Projections"
    o: "decode_step.Projections"
    gate_up: "decode_step.Projections"
    down: "decode_step.Projections"
    attention: "cuda_attention.Attention"


class FusedStep:
    """Computes the steps of a decoder for a cache of one stream; a `Stepper`.

    Args:
        decoder: With rules as they shall be applied; later changes are not seen.
        cache: The stream.
        overlap: Let launches begin before the one in front has ended, where the GPU can.
        configs: How to config "qkv", "o", "gate_up" or "down"; by default as was measured to be
            fast.

    Attributes:
        memory: Sums of a step.
        layers: What the launches of each layer are given.
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
        """Append a token to the stream; see `Decoder.step`."""
        with torch.cuda.device(self.memory.hidden.device):
            return self._step(tokens, cache)

    def _step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        memory, dependent, decoder = self.memory, self._dependent, self._decoder
        places = zip(cache.keys, cache.values, cache.cosines, cache.sines, strict=False)
        embed_argmax.embed(
            tokens,
            decoder.weights.embedding,
            memory,
            decoder.embedding_multiplier,
            dependent=dependent,
        )
        for index, (layer, place) in enumerate(zip(self.layers, places, strict=True)):
            self._attend(layer, cache.positions, *place)
            self._feed_forward(layer, index)
        embed_argmax.final_norm(
            decoder.weights.final_norm,
            decoder.architecture.eps,
            memory,
            cache.positions,
            dependent=dependent,
        )
        return decoder.logits_of(memory.normed)

    def _attend(self, layer: Layer, positions: Tensor, *place: Tensor) -> None:
        """Add attention to the residual stream; `place` is keys, values, cosines and sines."""
        m, dependent = self.memory, self._dependent
        keys, values, cosines, sines = place
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
    """Return the fastest way to compute the steps of a decoder.

    Args:
        decoder: With rules as they shall be applied.
        cache: The streams.
        overlap: As in `FusedStep`.
    """
    reason = obstacle(decoder, cache)
    if reason is None:
        return FusedStep(decoder, cache, overlap=overlap)
    _log.info("Decoding operation by operation: %s.", reason)
    return decoder.step


def obstacle(decoder: Decoder, cache: KeyValueCache) -> str | None:
    """Say what keeps `FusedStep` from computing the steps of a decoder; `None` where nothing does.

    Args:
        decoder: With rules as they shall be applied.
        cache: The streams.
    """
    architecture, device = decoder.architecture, decoder.weights.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _AMPERE:
        return "the weights are not on a GPU of compute capability 8.0 or later"
    if decode_step is None:
        return "NVIDIA's Python bindings are not installed"
    if not nvrtc.can_compile(torch.cuda.get_device_capability(device)):
        return "NVIDIA's run-time compiler is not installed or does not know this GPU"
    dtype, form = decoder.weights.dtype, architecture.form
    sizes = (architecture.hidden_size, architecture.q_size, architecture.intermediate_size)
    heads_fit = cuda_attention.can_attend(
        architecture.heads, architecture.kv_heads, architecture.head_dim, cache.cosines[0]
    )
    obstacles = {
        "there is more than one stream": cache.rows > 1,
        "the weights are not bfloat16 or float16": dtype not in tile_config.DTYPES,
        "sizes are no multiples of 8": any(size % decode_step.ALIGNMENT for size in sizes),
        "heads are of an unusual size or turned in part": not heads_fit,
        "norms are not before attention and MLP alone": None in (form.attention_norm, form.mlp_norm)
        or form.attention_post_norm is not None
        or form.mlp_post_norm is not None,
        "q and k are normed as a whole": form.qk_norm == "vector",
        "rules have a score_scale or shift": not all(map(_is_plain, decoder.layers)),
        "projections are of output_sizes that weight_rows cannot be config at": not all(
            _can_load(calls, architecture, dtype) for calls in decoder.layers
        ),
    }
    return next((reason for reason, is_there in obstacles.items() if is_there), None)


def _is_plain(calls: LayerCalls) -> bool:
    products = (calls.qkv, calls.o, calls.gate_up, calls.down)
    return all(
        score_scale is None and shift is None
        for _weight, _thresholds, _columns, score_scale, shift, _bias in products
    )


def _can_load(calls: LayerCalls, architecture: Architecture, dtype: torch.dtype) -> bool:
    return all(
        tile_config.can_load(*_codes_and_params(product[0]), output_sizes, dtype)
        for product, output_sizes in _products(calls, architecture)
    )


def _products(
    calls: LayerCalls, architecture: Architecture
) -> Sequence[tuple[Product, Sequence[int]]]:
    """Return qkv, o, gate and up, and down, each with the output sizes of its parts."""
    qkv, o, gate_up, down = calls.qkv, calls.o, calls.gate_up, calls.down
    halves = [architecture.intermediate_size] * 2
    return (qkv, qkv[2]), (o, o[2]), (gate_up, halves), (down, down[2])


def _layer(
    decoder: Decoder, calls: LayerCalls, configs: "Mapping[str, tile_config.TileConfig]"
) -> Layer:
    names = ("qkv", "o", "gate_up", "down")
    projections = {
        name: _projections(*product, source, calls, norm_weight, configs.get(name))
        for name, product, source, norm_weight in zip(
            names,
            _products(calls, decoder.architecture),
            ("hidden", "attention", "hidden", decoder.architecture.activation),
            (calls.norms[0], None, calls.norms[1], None),
            strict=True,
        )
    }
    return Layer(**projections, attention=cuda_attention.Attention(**calls.attend))


def _projections(
    product: Product,
    output_sizes: Sequence[int],
    source: str,
    calls: LayerCalls,
    norm_weight: Tensor | None,
    config: "tile_config.TileConfig | None",
) -> "decode_step.Projections":
    weight, thresholds, _, _, _, bias = product
    codes, quant = _codes_and_params(weight)
    padded = list(itertools.islice(itertools.chain(thresholds, itertools.repeat(0.0)), 3))
    return decode_step.Projections(
        weight=codes,
        quant=quant,
        output_sizes=output_sizes,
        thresholds=torch.tensor(padded, device=codes.device),
        input=source,  # type: ignore[arg-type]
        is_dense=keeps_everything(thresholds),
        bias=bias,
        norm_weight=norm_weight,
        eps=calls.eps,
        multiplier=1.0 if norm_weight is not None else calls.residual_multiplier,
        config=config,
    )


def _codes_and_params(weight: Matrix) -> tuple[Tensor, QuantParams | None]:
    if isinstance(weight, Tensor):
        return weight, None
    return weight.codes, QuantParams(weight.scales, weight.zeros, weight.group_size)
