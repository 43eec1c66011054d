"""What a kernel is compiled for: typed constants that become `struct Config` in config.cuh."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum

import torch

# Fractional bits of fixed-point sums.
FRACTION_BITS = 40

Constant = bool | int | Enum


class Dtype(Enum):
    """Dtype of activations, logits or scales, as in types.cuh."""

    FLOAT32 = torch.float32
    FLOAT16 = torch.float16
    BFLOAT16 = torch.bfloat16


class Format(Enum):
    """How a weight is stored, as in types.cuh."""

    FLOAT = "float"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


class Input(Enum):
    """What a decode step makes the input of a product from, as in types.cuh."""

    HIDDEN = "hidden"
    ATTENTION = "attention"
    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


class Activation(Enum):
    """Activation function of a gate, as in types.cuh."""

    NONE = None
    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """A product of activations with a weight, and how it is divided among blocks.

    Attributes:
        dtype: Dtype of the activations.
        in_features: Channels.
        out_features: Columns of all parts.
        rows: Rows of activations that are multiplied at once.
        format: How the weight is stored.
        group_size: Channels that share a scale; 0 for a weight that is not quantized.
        scale_dtype: Dtype of the scales.
        has_zeros: Codes have zeros of their own, one per group and column.
        start_1: First column of the second part.
        start_2: First column of the third part.
        chunk: Channels that a block takes at a time; this and what follows is as in `TileConfig`.
        per_lane: Columns of a thread.
        warps_n: Warps side by side.
        warps_k: Warps that share the channels.
        unroll: Weight rows that a thread loads at a time.
        blocks: Blocks per multiprocessor that the compiler makes room for.
        cluster: Blocks per cluster.
        depth: 2 to load weight rows while adding the previous ones, else 1.
        early: Channels of a warp whose weight rows are prefetched during compaction.
        fraction_bits: Fractional bits of fixed-point sums.
    """

    dtype: Dtype
    in_features: int
    out_features: int
    rows: int
    format: Format
    group_size: int
    scale_dtype: Dtype
    has_zeros: bool
    start_1: int
    start_2: int
    chunk: int
    per_lane: int
    warps_n: int
    warps_k: int
    unroll: int
    blocks: int
    cluster: int
    depth: int
    early: int
    fraction_bits: int = FRACTION_BITS


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A product of a decode step (decode_step.cu).

    Attributes:
        kernel: Name of the kernel, which profiles show.
        product: Weight and division into blocks.
        input: What the input is made from.
        head_dim: Channels of an attention head.
        splits: Splits of the context.
        has_bias: Whether a bias is added.
    """

    kernel: str
    product: ProductConfig
    input: Input
    head_dim: int
    splits: int
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class GemvConfig:
    """A product on its own (gemv.cu).

    Attributes:
        product: Weight and division into blocks.
        activation: Activation function of the gate, if the parts are gate and up.
        has_norm: Whether the input goes through an RMSNorm first.
        has_one_mask: Gate and up keep the same channels.
        has_score_scale: Whether scores are scaled.
        has_shift: Whether activations are centred.
        prefetched_rows: Weight rows of a chunk that a dense part prefetches before its input is
            known.
    """

    product: ProductConfig
    activation: Activation
    has_norm: bool
    has_one_mask: bool
    has_score_scale: bool
    has_shift: bool
    prefetched_rows: int


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention of a decode step (attention.cu).

    Attributes:
        dtype: Dtype of activations and cache.
        head_dim: Channels of a head.
        queries: Query heads per key head.
        splits: Splits of the context.
        warps: Warps of a block.
        has_norm_weights: Whether heads go through an RMSNorm.
        has_softcap: Whether scores are capped.
        fraction_bits: Fractional bits of fixed-point sums.
    """

    dtype: Dtype
    head_dim: int
    queries: int
    splits: int
    warps: int
    has_norm_weights: bool
    has_softcap: bool
    fraction_bits: int = FRACTION_BITS


@dataclass(frozen=True, kw_only=True)
class EmbedArgmaxConfig:
    """The beginning and the end of a decode step (embed_argmax.cu).

    Attributes:
        dtype: Dtype of the activations or, for `argmax`, of the logits.
        threads: Threads of a block of `final_norm` and `argmax`.
        cluster: Blocks that read the logits.
        fraction_bits: Fractional bits of fixed-point sums.
    """

    dtype: Dtype
    threads: int
    cluster: int
    fraction_bits: int = FRACTION_BITS


KernelConfig = StepConfig | GemvConfig | AttentionConfig | EmbedArgmaxConfig


def header(config: KernelConfig) -> str:
    """Return the text of config.cuh.

    Two things cannot be constants, and are macros: the attribute of kernels that run in clusters,
    and a kernel's name.
    """
    constants = dict(_constants(config))
    members = "\n".join(
        f"  static constexpr {_type(value)} {name} = {_literal(value)};"
        for name, value in constants.items()
    )
    cluster = constants.get("CLUSTER", 1)
    attribute = "" if cluster == 1 else f" __cluster_dims__(1, {cluster})"
    name = f"\n#define TEAL_KERNEL {config.kernel}" if isinstance(config, StepConfig) else ""
    return (
        f'#pragma once\n#include "types.cuh"\n#define TEAL_CLUSTER{attribute}{name}\n'
        f"namespace teal {{\nstruct Config {{\n{members}\n}};\n}}\n"
    )


def cluster_of(config: KernelConfig) -> int:
    """Return the blocks of a cluster."""
    return int(dict(_constants(config)).get("CLUSTER", 1))  # type: ignore[arg-type]


def _constants(config: object) -> Iterator[tuple[str, Constant]]:
    assert is_dataclass(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _constants(value)
        elif not isinstance(value, str):
            yield field.name.upper(), value


def _type(value: Constant) -> str:
    return type(value).__name__


def _literal(value: Constant) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}::{value.name}"
    return str(value).lower()
