"""The network: a plain Llama whose state dict is that of `LlamaForCausalLM`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1024,
    max_position_embeddings=1024,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    attention_bias=False,
    mlp_bias=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


class Llama(nn.Module):
    """The model with its loss; `build` initialises it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.model = _Body(dropout)
        cos, sin = _rotary_tables()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token.

        Args:
            ids: Token ids, (batch, tokens), int64.
            targets: The tokens that follow each of them, (batch, tokens), int64.
        """
        x = F.dropout(self.model.embed_tokens(ids), self.dropout, self.training)
        if torch.is_autocast_enabled():
            x = x.bfloat16()
        tokens = ids.shape[1]
        cos, sin = self.cos[:tokens].to(x.dtype), self.sin[:tokens].to(x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def build(dropout: float = 0.0) -> Llama:
    """Return a freshly initialised model; projections that end a branch start smaller."""
    model = Llama(dropout)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            shrink = math.sqrt(2 * CONFIG.num_hidden_layers) if ends_branch else 1.0
            nn.init.normal_(parameter, std=0.02 / shrink)
    return model


class _Body(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)
        self.layers = nn.ModuleList(_Block(dropout) for _ in range(CONFIG.num_hidden_layers))
        self.norm = _RMSNorm()


class _Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm, self.self_attn = _RMSNorm(), _Attention()
        self.post_attention_layernorm, self.mlp = _RMSNorm(), _MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + F.dropout(attention, self.dropout, self.training)
        mlp = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(mlp, self.dropout, self.training)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        queries = CONFIG.num_attention_heads * CONFIG.head_dim
        keys = CONFIG.num_key_value_heads * CONFIG.head_dim
        self.q_proj = _linear(CONFIG.hidden_size, queries)
        self.o_proj = _linear(queries, CONFIG.hidden_size)
        self.k_proj = _linear(CONFIG.hidden_size, keys)
        self.v_proj = _linear(CONFIG.hidden_size, keys)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, -1, CONFIG.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        groups = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = _linear(CONFIG.hidden_size, CONFIG.intermediate_size)
        self.up_proj = _linear(CONFIG.hidden_size, CONFIG.intermediate_size)
        self.down_proj = _linear(CONFIG.intermediate_size, CONFIG.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONFIG.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + CONFIG.rms_norm_eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


def _rotary_tables() -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary embedding, (tokens, head_dim) each."""
    exponents = torch.arange(0, CONFIG.head_dim, 2).float() / CONFIG.head_dim
    frequencies = CONFIG.rope_parameters["rope_theta"] ** -exponents
    positions = torch.arange(CONFIG.max_position_embeddings).float()
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
