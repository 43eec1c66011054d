"""The decode step of one stream on a GPU, in five launches per layer.

Where the general path of `Decoder.step` brings every sum to the activations' dtype before the next
call reads it, this one hands over sums in fixed point, makes the lists of kept channels where they
are used, and lets each launch begin before the one in front has ended.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.engine.cache import KeyValueCache
from teal.engine.decoder import Decoder, Stepper
from teal.engine.layers import LayerCalls, Product

if importlib.util.find_spec("cuda") and importlib.util.find_spec("triton"):
    from teal.kernels import cuda_step, triton_attention_launch
else:
    cuda_step = triton_attention_launch = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """What the launches of one layer are given."""

    qkv: "cuda_step.Projections"
    o: "cuda_step.Projections"
    gate_up: "cuda_step.Projections"
    down: "cuda_step.Projections"
    calls: LayerCalls


class FusedStep:
    """Computes the steps of a decoder for a cache of one stream; a `Stepper`.

    Args:
        decoder: With rules as they shall be applied; later changes are not seen.
        cache: The stream.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache) -> None:
        architecture, weights = decoder.architecture, decoder.weights
        self._decoder = decoder
        self._dependent = triton_attention_launch.has_dependent_launch(weights.device)
        splits = triton_attention_launch.splits_for(cache.capacity)
        self._memory = cuda_step.StepMemory(
            architecture.hidden_size,
            architecture.q_size + 2 * architecture.kv_size,
            architecture.intermediate_size,
            (architecture.heads, splits, architecture.head_dim),
            weights.dtype,
            weights.device,
        )
        self._layers = [_layer(decoder, calls) for calls in decoder.layers]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Append a token to the stream; see `Decoder.step`."""
        memory, dependent, decoder = self._memory, self._dependent, self._decoder
        places = zip(cache.keys, cache.values, cache.cosines, cache.sines, strict=False)
        cuda_step.embed(
            tokens,
            decoder.weights.embedding,
            memory,
            decoder.embedding_multiplier,
            dependent=dependent,
        )
        for layer, place in zip(self._layers, places, strict=True):
            self._run(layer, cache.positions, *place)
        cuda_step.final_norm(
            decoder.weights.final_norm, decoder.architecture.epsilon, memory, dependent=dependent
        )
        cache.positions += 1
        return decoder.logits_of(memory.normed)

    def _run(
        self,
        layer: _Layer,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        cosines: Tensor,
        sines: Tensor,
    ) -> None:
        m, dependent = self._memory, self._dependent
        cuda_step.project(layer.qkv, m.hidden, m.qkv, m.gate_up, m, dependent=dependent)
        triton_attention_launch.attend_parts(
            m.qkv,
            keys,
            values,
            positions,
            cosines,
            sines,
            m.parts,
            **layer.calls.attend,
            unit=cuda_step.UNIT,
            dependent=dependent,
        )
        cuda_step.project(layer.o, m.parts, m.hidden, m.qkv, m, dependent=dependent)
        cuda_step.project(layer.gate_up, m.hidden, m.gate_up, None, m, dependent=dependent)
        cuda_step.project(layer.down, m.gate_up, m.hidden, None, m, dependent=dependent)


def stepper_of(decoder: Decoder, cache: KeyValueCache) -> Stepper:
    """Return the fastest way to compute the steps of a decoder.

    Args:
        decoder: With rules as they shall be applied.
        cache: The streams.
    """
    return FusedStep(decoder, cache) if can_fuse(decoder, cache) else decoder.step


def can_fuse(decoder: Decoder, cache: KeyValueCache) -> bool:
    """Tell whether `FusedStep` computes the steps of a decoder.

    It does for one stream of a model in bfloat16 or float16, not quantized, with norms before
    attention and MLP only, and rules that are a plain threshold.
    """
    weights, form = decoder.weights, decoder.architecture.form
    if cuda_step is None or weights.device.type != "cuda" or cache.rows > 1:
        return False
    architecture = decoder.architecture
    sizes = (
        architecture.hidden_size,
        architecture.q_size,
        architecture.kv_size,
        architecture.intermediate_size,
    )
    return (
        weights.dtype in cuda_step.DTYPES
        and all(size % cuda_step.ALIGNMENT == 0 for size in sizes)
        and triton_attention_launch.fits(architecture.head_dim, cache.cosines[0], weights.dtype)
        and form.attention_norm is not None
        and form.mlp_norm is not None
        and form.attention_post_norm is form.mlp_post_norm is None
        and form.qk_norm != "vector"
        and all(map(_is_plain, decoder.layers))
    )


def _is_plain(calls: LayerCalls) -> bool:
    products = (calls.qkv, calls.o, calls.gate_up, calls.down)
    return all(
        isinstance(weight, Tensor) and scale is None and shift is None
        for weight, _thresholds, _columns, scale, shift, _bias in products
    )


def _layer(decoder: Decoder, calls: LayerCalls) -> _Layer:
    architecture = decoder.architecture
    intermediate = [architecture.intermediate_size] * 2
    return _Layer(
        qkv=_projections(calls.qkv, calls.qkv[2], "hidden", calls, calls.norms[0]),
        o=_projections(calls.o, calls.o[2], "attention", calls),
        gate_up=_projections(calls.gate_up, intermediate, "hidden", calls, calls.norms[1]),
        down=_projections(calls.down, calls.down[2], architecture.activation, calls),
        calls=calls,
    )


def _projections(
    product: Product,
    widths: Sequence[int],
    source: str,
    calls: LayerCalls,
    gain: Tensor | None = None,
) -> "cuda_step.Projections":
    weight, thresholds, _, _, _, bias = product
    assert isinstance(weight, Tensor)
    padded = list(itertools.islice(itertools.chain(thresholds, itertools.repeat(0.0)), 3))
    return cuda_step.Projections(
        weight=weight,
        widths=widths,
        thresholds=torch.tensor(padded, device=weight.device),
        input=source,  # type: ignore[arg-type]
        is_dense=max(thresholds) < 0.0,
        bias=bias,
        gain=gain,
        epsilon=calls.epsilon,
        multiplier=1.0 if gain is not None else calls.residual_multiplier,
    )
