"""Inputs and exact results that the tests of several kernels share."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels import dispatch
from teal.kernels.reference import matmul as reference

# What a mask must get right beside ordinary numbers.
EDGES = (0.0, -0.0, 0.3, -0.3, 1.0, -1.0, 2.0**-24, 1e-40, -1e-40)
THRESHOLDS = (-1.0, 0.0, 2.0**-24, 0.3, 0.1 + 0.2, 1.0, math.inf)
VECTORS = ("plain", "score_scale", "shift", "score_scale and shift")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw a normal tensor; the same seed gives the same numbers in every dtype, rounded."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, threshold: float, **vectors: Tensor | None) -> Tensor:
    """Compute `reference.sparse_gemv` in float64, from the mask of the reference."""
    bias = vectors.pop("bias", None)
    shift = vectors.get("shift")
    centred = x if shift is None else (x.float() - shift).to(x.dtype)
    keep = reference.keep_mask(x, threshold, **vectors)
    product = torch.where(keep, centred, 0).double() @ weight.double()
    return product if bias is None else product + bias.double()


def by_reference(operation: Callable[..., Tensor], *positional: Any, **arguments: Any) -> Tensor:
    """Call an operation as a device without kernels computes it."""
    tables = (dispatch.BACKENDS, dispatch.ATTENTION_BACKENDS, dispatch.LM_HEAD_BACKENDS)
    with contextlib.ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table, clear=True))
        return operation(*positional, **arguments)


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call of `attend`: sequences whose caches hold tokens up to their positions."""

    positions: tuple[int, ...] = (6,)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    capacity: int = 40
    with_norm_weights: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Draw qkv, keys, values, positions, cosines and sines; NaN where nothing is cached."""
        rows, width = len(self.positions), (self.heads + 2 * self.kv_heads) * self.head_dim
        shape = (rows, self.kv_heads, self.capacity, self.head_dim)
        keys, values = draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
        for row, position in enumerate(self.positions):
            keys[row, :, position:] = math.nan
            values[row, :, position:] = math.nan
        inverse = 100.0 ** -torch.linspace(0, 1, self.rotary_dim // 2)
        angles = torch.arange(self.capacity + 3)[:, None] * inverse
        positions = torch.tensor(self.positions)
        return draw(rows, width, dtype=dtype), keys, values, positions, angles.cos(), angles.sin()

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the options of the call, with norm weights where the case has them."""
        norm_weights = {}
        if self.with_norm_weights:
            norm_weights = {
                name: 1 + 0.3 * draw(self.head_dim, dtype=dtype, seed=seed)
                for name, seed in (("q_norm_weight", 3), ("k_norm_weight", 4))
            }
            norm_weights["eps"] = 1e-3
        return {"scale": self.head_dim**-0.5, **norm_weights, **self.options}


ATTENTION_CASES: Mapping[str, AttentionCase] = {
    "first token": AttentionCase(positions=(0,)),
    "several sequences": AttentionCase(positions=(5, 0, 31, 17)),
    "one key head": AttentionCase(kv_heads=1),
    "no sharing": AttentionCase(kv_heads=4, head_dim=24, rotary_dim=24),
    "odd sharing": AttentionCase(heads=9, kv_heads=3, head_dim=10, rotary_dim=6),
    "full cache": AttentionCase(positions=(39, 38)),
    "window": AttentionCase(positions=(4, 5, 6, 30), options={"window": 6}),
    "window of one": AttentionCase(positions=(9,), options={"window": 1}),
    "softcap": AttentionCase(options={"softcap": 2.0, "scale": 1.5}),
    "norms": AttentionCase(positions=(5, 11), with_norm_weights=True),
    "partial rotary": AttentionCase(head_dim=16, rotary_dim=4),
    "no rotary": AttentionCase(rotary_dim=0),
    "everything": AttentionCase(
        positions=(20, 3, 39),
        rotary_dim=8,
        with_norm_weights=True,
        options={"window": 7, "softcap": 3.0},
    ),
}


def attended(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `attend` sequence by sequence with torch's own operations, leaving the caches alone.

    Everything runs in `dtype` but for keys and values, which are rounded to the dtype of `qkv`.

    Returns:
        The result, (T, heads · head_dim), and the new key and value, (T, kv_heads, head_dim).
    """
    rows, kv_heads, _, head_dim = keys.shape
    results, new_keys, new_values = [], [], []
    for row in range(rows):
        position = int(positions[row])
        first = max(0, position + 1 - window) if window else 0
        heads = qkv[row].to(dtype).view(-1, head_dim)
        q, k, v = heads.split([len(heads) - 2 * kv_heads, kv_heads, kv_heads])
        if q_norm_weight is not None and k_norm_weight is not None:
            q = F.rms_norm(q, (head_dim,), q_norm_weight.to(dtype), eps)
            k = F.rms_norm(k, (head_dim,), k_norm_weight.to(dtype), eps)
        cosine, sine = cosines[position].to(dtype), sines[position].to(dtype)
        q, k = (_turned(vectors, cosine, sine) for vectors in (q, k))
        k = k.to(keys.dtype)
        past_k = torch.cat([keys[row, :, first:position], k[:, None]], dim=1).to(dtype)
        past_v = torch.cat([values[row, :, first:position].to(dtype), v[:, None]], dim=1)
        shared = q.view(kv_heads, -1, head_dim)
        if softcap:
            scores = softcap * torch.tanh(shared @ past_k.mT * scale / softcap)
            result = scores.softmax(-1) @ past_v
        else:
            result = F.scaled_dot_product_attention(shared, past_k, past_v, scale=scale)
        results.append(result.flatten())
        new_keys.append(k)
        new_values.append(v.to(values.dtype))
    return torch.stack(results), torch.stack(new_keys), torch.stack(new_values)


def _turned(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Multiply complex numbers: RoPE is a rotation of pairs (i, i + rotary_dim / 2)."""
    half = cosine.shape[-1]
    rotated = vectors.clone()
    pairs = torch.complex(vectors[:, :half].double(), vectors[:, half : 2 * half].double())
    pairs = pairs * torch.complex(cosine.double(), sine.double())
    rotated[:, :half], rotated[:, half : 2 * half] = pairs.real, pairs.imag
    return rotated
