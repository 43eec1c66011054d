"""Launches embedding, final norm and argmax of a fused decode step; see embed_argmax.cu."""

import math

import torch
from torch import Tensor

from teal.kernels.cuda.decode_step import StepMemory
from teal.kernels.cuda.kernel_config import Dtype, EmbedArgmaxConfig
from teal.kernels.cuda.nvrtc import FLOAT, INT, function_of_step, has_clusters, launch

SOURCE = "embed_argmax.cu"

_EMBED_THREADS = 256
_THREADS = 1024
# Blocks that read the logits.
_CLUSTER = 8


def embed(
    token: Tensor, embedding: Tensor, memory: StepMemory, multiplier: float, *, dependent: bool
) -> None:
    """Begin a step: clear the overflow flag and sums, and embed a token as hidden states.

    Args:
        token: (1,), int64.
        embedding: (vocab_size, hidden_size), contiguous.
        memory: Holds the residual stream.
        multiplier: Factor of the embedding.
        dependent: The launch may begin before the previous one has ended.
    """
    size, first_sums = embedding.shape[1], memory.gate_up[0]
    config = embed_argmax_config(embedding.dtype)
    launch(
        function_of_step(SOURCE, "embed", config, token.device.index),
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


def final_norm(
    norm_weight: Tensor, eps: float, memory: StepMemory, position: Tensor, *, dependent: bool
) -> None:
    """Write the normed residual stream to `memory.normed`, NaN everywhere after an overflow.

    The position advances by one.

    Args:
        norm_weight: Weight of the final norm, (hidden_size,), float32.
        eps: Added to the mean square in that norm.
        memory: Holds the residual stream.
        position: Position of the token, (1,), int64.
        dependent: The launch may begin before the previous one has ended.
    """
    config = embed_argmax_config(memory.normed.dtype)
    launch(
        function_of_step(SOURCE, "final_norm", config, norm_weight.device.index),
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


def argmax(logits: Tensor, token: Tensor, history: Tensor, step: Tensor, broken: int) -> None:
    """Find the likeliest token, the first of equals, and record it.

    Args:
        logits: (1, vocab_size), bfloat16, float16 or float32, contiguous.
        token: Receives the token, (1,), int64.
        history: Its row `step` receives the token, (steps, 1), int64.
        step: Number of the step, (1,), int64; advances by one.
        broken: Recorded in `history` if the logits hold NaN or infinity.
    """
    device = logits.device
    dependent = has_clusters(device)
    cluster = _CLUSTER if dependent else 1
    config = embed_argmax_config(logits.dtype, cluster)
    with torch.cuda.device(device):
        launch(
            function_of_step(SOURCE, "argmax", config, device.index),
            (1, cluster),
            _THREADS,
            [logits, token, history, step, (logits.shape[1], INT), (broken, INT)],
            dependent=dependent,
        )


def embed_argmax_config(dtype: torch.dtype, cluster: int = 1) -> EmbedArgmaxConfig:
    """Return what the kernels are compiled for.

    Args:
        dtype: Dtype of the activations or, for `argmax`, of the logits.
        cluster: Blocks that read the logits.
    """
    return EmbedArgmaxConfig(dtype=Dtype(dtype), threads=_THREADS, cluster=cluster)
