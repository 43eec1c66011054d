"""Quantized model folders as others publish them, with the dense model of the same values."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from teal.models.families import projections_of
from tests.helpers import tiny_model
from tests.quantization import packers

# A multiple of what fits into a word.
VOCABULARY = 96

Packer = Callable[[packers.Codes], Mapping[str, Tensor]]
CHECKPOINTS: Mapping[str, tuple[dict[str, Any], Packer]] = {
    "awq": (packers.awq_config(), packers.awq_tensors),
    "gptq": (packers.gptq_config(), packers.gptq_tensors),
    "compressed-tensors": (
        packers.compressed_config(packers.int_weights(symmetric=False), "pack-quantized"),
        lambda codes: packers.packed_tensors(codes, has_zeros=True),
    ),
}


def write_checkpoint(
    folder: Path, kind: str, *, has_head: bool = False, **changes: Tensor | None
) -> Any:
    """Write a quantized llama, its head too if asked; return the dense model of the same values."""
    config, pack = CHECKPOINTS[kind]
    model = tiny_model("llama", intermediate_size=64, vocab_size=VOCABULARY)
    tensors = dict(model.state_dict())
    heads = {"lm_head": model.lm_head} if has_head else {}
    for seed, (name, linear) in enumerate((projections_of(model) | heads).items()):
        shape = (linear.in_features, linear.out_features)
        codes = packers.random_codes(shape=shape, seed=seed)
        codes = replace(codes, scales=0.05 * codes.scales)
        linear.weight.data = codes.weight.float().t()
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in pack(codes).items()}
    model.config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(content))
    tensors |= changes
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return model
