"""Sizes of known models: configurations with random weights, and the products of their layers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from teal.foundation.errors import UserError, unknown_name

_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}

# From the config.json of each model; fields that are left out do not change the time.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        **_LLAMA_3,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        **_LLAMA_3,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        **_LLAMA_3,
        "max_position_embeddings": 131072,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
}

_FIELDS: Mapping[str, str] = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv-heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}
_REQUIRED = ("hidden", "intermediate", "layers", "heads", "vocab")
_CONFIG_EXAMPLE = "hidden=2048,intermediate=5632,layers=8,heads=16,kv-heads=16,vocab=32000"

# "4096x11008" or, with a threshold per part, "4096x4096+1024+1024"; and gate and up.
_PARTS = re.compile(r"(\d+)x(\d+(?:\+\d+){0,2})")
_GATED = re.compile(r"(\d+)x2x(\d+)")
_SIZE_EXAMPLES = ("4096x11008", "4096x2x14336", "4096x4096+1024+1024")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of one product.

    Attributes:
        form: "plain", "parts" (q, k and v) or "gated" (gate and up).
        in_features: Size of the input.
        output_sizes: Columns of each part.
    """

    form: str
    in_features: int
    output_sizes: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Columns of the weight."""
        return sum(self.output_sizes)

    @property
    def name(self) -> str:
        """Name in tables, such as "4096 → 2×14336"."""
        out = f"2×{self.output_sizes[0]}" if self.form == "gated" else str(self.out_features)
        return f"{self.in_features} → {out}"


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes of a decoder layer.

    Attributes:
        hidden: hidden_size.
        intermediate: intermediate_size.
        queries: out_features of q_proj.
        keys: out_features of k_proj, and of v_proj.
    """

    hidden: int
    intermediate: int
    queries: int
    keys: int

    @classmethod
    def of(cls, config: Mapping[str, int]) -> "LayerSizes":
        """Take the sizes from the fields of a Hugging Face configuration."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim", hidden // heads)
        return cls(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            queries=heads * head_dim,
            keys=config["num_key_value_heads"] * head_dim,
        )

    def shapes(self) -> list[Shape]:
        """Return the products of the layer, in the order of the forward pass."""
        hidden, intermediate = self.hidden, self.intermediate
        qkv = (self.queries, self.keys, self.keys)
        return [
            Shape(form="parts", in_features=hidden, output_sizes=qkv),
            Shape(form="plain", in_features=self.queries, output_sizes=(hidden,)),
            Shape(form="gated", in_features=hidden, output_sizes=(intermediate, intermediate)),
            Shape(form="plain", in_features=intermediate, output_sizes=(hidden,)),
        ]


def config_of(text: str) -> Any:
    """Return the Hugging Face configuration that `text` names.

    Args:
        text: A key of `CONFIGS`, or the sizes of a Llama such as
            "hidden=2048,intermediate=5632,layers=8,heads=16,kv-heads=16,vocab=32000"; `kv-heads`
            and `context` are optional.

    Raises:
        UserError: `text` is neither.
    """
    if "=" not in text and text not in CONFIGS:
        raise unknown_name("configuration", text, [*CONFIGS, _CONFIG_EXAMPLE])
    fields = dict(CONFIGS[text]) if text in CONFIGS else _fields_of(text)
    # No token ends a measurement, and a default id would lie outside a small vocabulary.
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return AutoConfig.for_model(**{"tie_word_embeddings": False, **no_tokens, **fields})


def shapes_of(name: str) -> list[Shape]:
    """Return the products that `name` refers to.

    Args:
        name: A key of `CONFIGS`, or in_features x out_features: "4096x11008", "4096x2x14336" for
            gate and up, "4096x4096+1024+1024" for parts with a threshold each.

    Raises:
        UserError: `name` is neither.
    """
    if name in CONFIGS:
        return LayerSizes.of(CONFIGS[name]).shapes()
    shape = _shape_of(name)
    if shape is None:
        raise unknown_name("model or size", name, [*CONFIGS, *_SIZE_EXAMPLES])
    if not shape.in_features or not all(shape.output_sizes):
        raise UserError(f"Size {name!r} has a zero. Give sizes such as 4096x11008.")
    return [shape]


def _fields_of(text: str) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _FIELDS:
            raise unknown_name("size", name, _FIELDS)
        if not value.isdecimal() or not int(value):
            raise UserError(f"{part!r} is not a size. Give {_CONFIG_EXAMPLE}.")
        sizes[name] = int(value)
    missing = [name for name in _REQUIRED if name not in sizes]
    if missing:
        raise UserError(f"{text!r} lacks {', '.join(missing)}. Give {_CONFIG_EXAMPLE}.")
    sizes.setdefault("kv-heads", sizes["heads"])
    if sizes["hidden"] % sizes["heads"] or sizes["heads"] % sizes["kv-heads"]:
        raise UserError(
            f"{text!r} does not divide evenly. hidden must be a multiple of heads, and heads one "
            "of kv-heads."
        )
    return {"model_type": "llama", **{_FIELDS[name]: size for name, size in sizes.items()}}


def _shape_of(name: str) -> Shape | None:
    gated, parts = _GATED.fullmatch(name), _PARTS.fullmatch(name)
    if gated:
        in_features, size = map(int, gated.groups())
        return Shape(form="gated", in_features=in_features, output_sizes=(size, size))
    if parts:
        output_sizes = tuple(map(int, parts[2].split("+")))
        form = "plain" if len(output_sizes) == 1 else "parts"
        return Shape(form=form, in_features=int(parts[1]), output_sizes=output_sizes)
    return None
