"""The weights of a decoder, fused and channel-major, from any source."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from teal.engine.weights.matrix import Matrix, format_of
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.models.architectures import Architecture, ProjectionInput

# Old checkpoints store these tensors, which every model computes itself.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """Weights of one decoder layer.

    Matrices are channel-major, (in_features, out_features), contiguous, float or quantized. Norm
    weights include the offset of the norm; they are float32, or on the CPU in the dtype of the
    matrices if that is exact. Norm weights and biases that the layer lacks are `None`.

    Attributes:
        qkv: Projections to queries, keys and values side by side,
            (hidden_size, (heads + 2 · kv_heads) · head_dim).
        qkv_bias: Biases of `qkv`, ((heads + 2 · kv_heads) · head_dim,).
        o: Output projection of attention, (heads · head_dim, hidden_size).
        o_bias: Bias of `o`, (hidden_size,).
        gate_up: Gate and up projection side by side, (hidden_size, 2 · intermediate_size).
        gate_up_bias: Biases of `gate_up`, (2 · intermediate_size,).
        down: Output projection of the MLP, (intermediate_size, hidden_size).
        down_bias: Bias of `down`, (hidden_size,).
        attention_norm: Weight of the norm before attention, (hidden_size,).
        mlp_norm: Weight of the norm before the MLP, (hidden_size,).
        attention_post_norm: Weight of the norm after attention, (hidden_size,).
        mlp_post_norm: Weight of the norm after the MLP, (hidden_size,).
        q_norm: Weight of the norm of queries, (head_dim,) or (heads · head_dim,).
        k_norm: Weight of the norm of keys, (head_dim,) or (kv_heads · head_dim,).
    """

    qkv: Matrix
    qkv_bias: Tensor | None
    o: Matrix
    o_bias: Tensor | None
    gate_up: Matrix
    gate_up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None
    attention_norm: Tensor | None
    mlp_norm: Tensor | None
    attention_post_norm: Tensor | None
    mlp_post_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """The matrices in the order of `Architecture.inputs`."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    """All weights of a decoder.

    Attributes:
        embedding: One row per token id, (vocab_size, hidden_size).
        layers: One entry per decoder layer.
        final_norm: Weight of the norm before the LM head, (hidden_size,).
        head: Weight of the LM head, (vocab_size, hidden_size): logits are `F.linear(h, head)`. The
            embedding itself if the model ties them. A quantized head is channel-major like the
            other matrices, (hidden_size, vocab_size).
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Matrix

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding, of matrices that are not quantized, and of the hidden states."""
        return self.embedding.dtype

    @property
    def format(self) -> str:
        """Format of the projections: "float", "int8", "int4" or "fp8"; "fp8+int4" if mixed."""
        formats = {format_of(matrix) for layer in self.layers for matrix in layer.matrices}
        return "+".join(sorted(formats))

    @property
    def device(self) -> torch.device:
        """Device of all weights."""
        return self.embedding.device

    @property
    def num_bytes(self) -> int:
        """Size of all weights in bytes, counting a tied head once."""
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in self._tensors()}
        return sum(tensors.values())

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.embedding, self.final_norm, *_tensors_of(self.head))
        for layer in self.layers:
            for field in fields(layer):
                yield from _tensors_of(getattr(layer, field.name))


class Source(Protocol):
    """Supplies weights: from a model, from a folder, or drawn at random."""

    def matrix(self, output_sizes: Mapping[str, int], in_features: int) -> Matrix:
        """Return projections side by side, channel-major.

        Args:
            output_sizes: out_features by full parameter name.
            in_features: Size of their common input.

        Returns:
            (in_features, sum of the output sizes), contiguous.
        """
        ...

    def vector(self, output_sizes: Mapping[str, int]) -> Tensor:
        """Return concatenated vectors, (sum of the output sizes,).

        Args:
            output_sizes: Length by full parameter name.
        """
        ...

    def rows(self, name: str, shape: tuple[int, int]) -> Matrix:
        """Return a matrix in its own layout and shape; channel-major if it is quantized."""
        ...


def assemble(
    architecture: Architecture, source: Source, *, tied_head: bool, progress: Progress = silent
) -> DecoderWeights:
    """Collect the weights of a decoder from a source, one after the other.

    Args:
        architecture: Architecture of the model.
        source: Supplies the weights.
        tied_head: Whether the head is the embedding.
        progress: Shows progress over the layers.

    Raises:
        UserError: The embedding is quantized.
    """
    shape = (architecture.vocab_size, architecture.hidden_size)
    base = architecture.family.blocks.rpartition(".")[0]
    embedding = source.rows(f"{base}.embed_tokens.weight", shape)
    if not isinstance(embedding, Tensor):
        raise UserError(
            "The embedding is quantized, and the engine looks up floats. Use a checkpoint that "
            "leaves its embedding unquantized."
        )
    layers = progress(range(architecture.num_layers), "Weights")
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_layer(architecture, source, layer) for layer in layers),
        final_norm=_norm_weight(architecture, source, f"{base}.norm", architecture.hidden_size),
        head=embedding if tied_head else source.rows("lm_head.weight", shape),
    )


def transposed_parts(fused: Tensor, output_sizes: Mapping[str, int]) -> list[Tensor]:
    """Return the columns of each projection in the layout of `nn.Linear`.

    Args:
        fused: Projections side by side, (in_features, sum of the output sizes).
        output_sizes: out_features by full parameter name.

    Returns:
        Views, (out_features, in_features).
    """
    return [part.t() for part in torch.split(fused, list(output_sizes.values()), dim=1)]


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a parameter has the shape that the architecture requires.

    Raises:
        UserError: It has another shape.
    """
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{name} has shape {tuple(tensor.shape)}, the configuration says {shape}. "
            "Use the config.json that belongs to the weights."
        )


def require_all_read(
    architecture: Architecture, names: set[str], read: set[str], what: str
) -> None:
    """Check that every parameter of the layers has been read.

    Args:
        architecture: Architecture of the model.
        names: Names of all parameters.
        read: Names of the parameters that `assemble` read.
        what: Model or folder that holds them, for the message.

    Raises:
        UserError: A layer has an unread parameter, so it computes something else than the engine.
    """
    layers = tuple(f"{architecture.layer_name(i)}." for i in range(architecture.num_layers))
    unread = [
        name
        for name in sorted(names - read)
        if name.startswith(layers) and not name.endswith(_COMPUTED)
    ]
    if unread:
        raise UserError(
            f"{what} holds {unread[0]}, which the engine does not know. "
            "Run the model with transformers."
        )


def _tensors_of(value: Matrix | None) -> Iterable[Tensor]:
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else value.tensors().values()


def _layer(architecture: Architecture, source: Source, layer: int) -> LayerWeights:
    attention, o, mlp, down = architecture.inputs(layer)
    form = architecture.form

    def norm(name: str | None) -> Tensor | None:
        if name is None:
            return None
        full_name = f"{architecture.layer_name(layer)}.{name}"
        return _norm_weight(architecture, source, full_name, architecture.hidden_size)

    return LayerWeights(
        qkv=_matrix(source, attention),
        qkv_bias=_bias(source, attention, architecture.qkv_bias),
        o=_matrix(source, o),
        o_bias=_bias(source, o, architecture.o_bias),
        gate_up=_matrix(source, mlp),
        gate_up_bias=_bias(source, mlp, architecture.mlp_bias),
        down=_matrix(source, down),
        down_bias=_bias(source, down, architecture.mlp_bias),
        attention_norm=norm(form.attention_norm),
        mlp_norm=norm(form.mlp_norm),
        attention_post_norm=norm(form.attention_post_norm),
        mlp_post_norm=norm(form.mlp_post_norm),
        q_norm=_head_norm_weight(architecture, source, layer, "q_norm", architecture.q_size),
        k_norm=_head_norm_weight(architecture, source, layer, "k_norm", architecture.kv_size),
    )


def _matrix(source: Source, entry: ProjectionInput) -> Matrix:
    output_sizes = {f"{name}.weight": width for name, width in entry.output_sizes.items()}
    return source.matrix(output_sizes, entry.in_features)


def _bias(source: Source, entry: ProjectionInput, present: bool) -> Tensor | None:
    output_sizes = {f"{name}.bias": width for name, width in entry.output_sizes.items()}
    return source.vector(output_sizes) if present else None


def _norm_weight(architecture: Architecture, source: Source, name: str, size: int) -> Tensor:
    norm_weight = source.vector({f"{name}.weight": size})
    if norm_weight.device.type == "cpu" and architecture.form.norm_offset == 0:
        # Products on the CPU fuse a norm only if its weight has the dtype of the activations.
        return norm_weight
    return norm_weight.float() + architecture.form.norm_offset


def _head_norm_weight(
    architecture: Architecture, source: Source, layer: int, name: str, size: int
) -> Tensor | None:
    if architecture.form.qk_norm == "none":
        return None
    per_head = architecture.form.qk_norm == "head"
    attention = f"{architecture.layer_name(layer)}.{architecture.family.attention}"
    return _norm_weight(
        architecture, source, f"{attention}.{name}", architecture.head_dim if per_head else size
    )
