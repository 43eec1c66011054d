"""The true sizes of models that are measured with random weights."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from teal.foundation.errors import UserError, unknown_name

_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}

# From the config.json of each model; what is not said here does not change the time.
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
_EXAMPLE = "hidden=2048,intermediate=5632,layers=8,heads=16,kv-heads=16,vocab=32000"


def config_of(text: str) -> Any:
    """Return the Hugging Face configuration that `text` stands for.

    Args:
        text: A key of `CONFIGS`, or the sizes of a Llama such as
            "hidden=2048,intermediate=5632,layers=8,heads=16,kv-heads=16,vocab=32000"; `kv-heads`
            and `context` may be left out.

    Raises:
        UserError: It is neither.
    """
    if "=" not in text and text not in CONFIGS:
        raise unknown_name("configuration", text, [*CONFIGS, _EXAMPLE])
    fields = dict(CONFIGS[text]) if text in CONFIGS else _fields_of(text)
    # No token ends a measurement, and no config class may trip over a token outside a small
    # vocabulary.
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return AutoConfig.for_model(**{"tie_word_embeddings": False, **ends, **fields})


def _fields_of(text: str) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in _FIELDS:
            raise unknown_name("size", name, _FIELDS)
        if not value.isdecimal() or not int(value):
            raise UserError(f"{part!r} is no size. Give {_EXAMPLE}.")
        sizes[name] = int(value)
    missing = [name for name in _REQUIRED if name not in sizes]
    if missing:
        raise UserError(f"{text!r} lacks {', '.join(missing)}. Give {_EXAMPLE}.")
    sizes.setdefault("kv-heads", sizes["heads"])
    if sizes["hidden"] % sizes["heads"] or sizes["heads"] % sizes["kv-heads"]:
        raise UserError(
            f"{text!r} does not divide evenly. hidden must be a multiple of heads, and heads one "
            "of kv-heads."
        )
    return {"model_type": "llama", **{_FIELDS[name]: size for name, size in sizes.items()}}
