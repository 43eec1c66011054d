"""Launches the beginning and the end of a decode step of one stream; see embed_argmax.cu."""

import math

import torch
from torch import Tensor

from teal.kernels.cuda.decode_step import StepMemory
from teal.kernels.cuda.nvrtc import FLOAT, INT, Definitions, function_of_step, has_clusters, launch
from teal.kernels.cuda.tile_config import FRACTION_BITS

SOURCE = "embed_argmax.cu"

_EMBED_THREADS = 256
_THREADS = 1024
# Blocks that read the logits.
_CLUSTER = 8


def embed(
    token: Tensor, embedding: Tensor, memory: StepMemory, multiplier: float, *, dependent: bool
) -> None:
    """Start a step: no overflow, no sums, and the embedding of a token as hidden states.

    Args:
        token: (1,), int64.
        embedding: (vocab_size, hidden_size), contiguous.
        memory: Where the stream is.
        multiplier: Of the embedding.
        dependent: The launch may begin before the one in front has ended.
    """
    size, first_sums = embedding.shape[1], memory.gate_up[0]
    launch(
        function_of_step(SOURCE, "embed", definitions_of(embedding.dtype), token.device.index),
        (math.ceil(size / _EMBED_THREADS), 1),
        _EMBED_THREADS,
        [
            token,
            embedding,
            memory.hidden,
            first_sums,
            memory.overflow,
            (multiplier, FLOAT),
            (size, INT),
            (first_sums.numel(), INT),
        ],
        dependent=dependent,
    )


def finish(
    norm_weight: Tensor, eps: float, memory: StepMemory, position: Tensor, *, dependent: bool
) -> None:
    """Write the normed residual stream to `memory.normed`, and move on by a position.

    It is NaN everywhere after an overflow.

    Args:
        norm_weight: Of the final norm, (hidden_size,), float32.
        eps: Of that norm.
        memory: Where the stream is.
        position: Of the token, (1,), int64; one more afterwards.
        dependent: The launch may begin before the one in front has ended.
    """
    launch(
        function_of_step(
            SOURCE, "finish", definitions_of(memory.normed.dtype), norm_weight.device.index
        ),
        (1, 1),
        _THREADS,
        [
            memory.hidden,
            norm_weight,
            memory.overflow,
            memory.normed,
            position,
            (eps, FLOAT),
            (norm_weight.numel(), INT),
        ],
        dependent=dependent,
    )


def choose(logits: Tensor, token: Tensor, history: Tensor, step: Tensor, broken: int) -> None:
    """Choose the likeliest token, the first of equals.

    Args:
        logits: (1, vocab_size), bfloat16, float16 or float32, contiguous.
        token: Is set, (1,), int64.
        history: Row `step` is set, (steps, 1), int64.
        step: (1,), int64; one more afterwards.
        broken: Goes into `history` where the logits hold NaN or infinity.
    """
    device = logits.device
    dependent = has_clusters(device)
    cluster = _CLUSTER if dependent else 1
    with torch.cuda.device(device):
        launch(
            function_of_step(SOURCE, "choose", definitions_of(logits.dtype, cluster), device.index),
            (cluster, 1),
            _THREADS,
            [logits, token, history, step, (logits.shape[1], INT), (broken, INT)],
            dependent=dependent,
        )


def definitions_of(dtype: torch.dtype, cluster: int = 1) -> Definitions:
    """Return what the kernels are compiled with.

    Args:
        dtype: Of the activations or, for `choose`, of the logits.
        cluster: Blocks that read the logits.
    """
    return (
        ("BFLOAT16", int(dtype == torch.bfloat16)),
        ("CLUSTER", cluster),
        ("FRACTION_BITS", FRACTION_BITS),
        ("LOGIT_BITS", torch.finfo(dtype).bits),
        ("THREADS", _THREADS),
    )
