"""Published checkpoint layouts, packed number by number from their specifications."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

IN, OUT, GROUP = 64, 48, 32


@dataclass(frozen=True)
class Codes:
    """Unsigned codes, zeros and scales, and the weight that they represent.

    Attributes:
        unsigned: Codes, (in_features, out_features), int64.
        zeros: Code of zero per group and output, (groups, out_features), int64.
        scales: Scale per group and output, (groups, out_features), float16.
        group_size: Input channels per group.
    """

    unsigned: Tensor
    zeros: Tensor
    scales: Tensor
    group_size: int

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, (in_features, out_features), float64."""
        group = torch.arange(len(self.unsigned)) // self.group_size
        return (self.unsigned - self.zeros[group]).double() * self.scales[group].double()


def random_codes(
    bits: int = 4, *, shape: tuple[int, int] = (IN, OUT), group_size: int = GROUP, seed: int = 0
) -> Codes:
    """Draw codes of all sizes, zeros among 1 … 2^bits - 1."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[0] // group_size)

    def draw(lowest: int, *size: int) -> Tensor:
        return torch.randint(lowest, 2**bits, size, generator=generator)

    scales = 0.01 + torch.rand(groups, shape[1], generator=generator)
    return Codes(draw(0, *shape), draw(1, groups, shape[1]), scales.half(), group_size)


def symmetric(codes: Codes, bits: int = 4) -> Codes:
    """Set every zero to the middle code."""
    middle = torch.full_like(codes.zeros, 2 ** (bits - 1))
    return Codes(codes.unsigned, middle, codes.scales, codes.group_size)


def words(rows: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack each row into 32-bit words; position p of a word takes column `order[p]` of its run."""
    per_word = 32 // bits
    order = order or range(per_word)
    packed = np.zeros((rows.shape[0], -(-rows.shape[1] // per_word)), dtype=np.uint64)
    for row, values in enumerate(rows.tolist()):
        for word in range(packed.shape[1]):
            for position, column in enumerate(order):
                index = word * per_word + column
                value = values[index] if index < len(values) else 0
                packed[row, word] |= np.uint64(value << (bits * position))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def awq_tensors(codes: Codes) -> dict[str, Tensor]:
    return {
        "qweight": words(codes.unsigned, 4, AWQ_ORDER),
        "qzeros": words(codes.zeros, 4, AWQ_ORDER),
        "scales": codes.scales,
    }


def awq_config(**changes: Any) -> dict[str, Any]:
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return {**config, "zero_point": True, **changes}


def gptq_tensors(codes: Codes, *, bits: int = 4, version: int = 1) -> dict[str, Tensor]:
    stored = codes.zeros - 1 if version == 1 else codes.zeros
    return {
        "qweight": words(codes.unsigned.T, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": codes.scales,
        "g_idx": (torch.arange(len(codes.unsigned)) // codes.group_size).int(),
    }


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, **changes}


def compressed_config(weights: Mapping[str, Any], layout: str, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {**group, **changes}},
        "ignore": ["lm_head"],
    }


def int_weights(bits: int = 4, **changes: Any) -> dict[str, Any]:
    args = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    return {**args, "group_size": GROUP, **changes}


def packed_tensors(codes: Codes, *, bits: int = 4, has_zeros: bool = False) -> dict[str, Tensor]:
    in_features, out_features = codes.unsigned.shape
    tensors = {
        "weight_packed": words(codes.unsigned.T, bits),
        "weight_scale": codes.scales.T.contiguous(),
        "weight_shape": torch.tensor([out_features, in_features]),
    }
    if has_zeros:
        tensors["weight_zero_point"] = words(codes.zeros, bits).T.contiguous()
    return tensors


def write_checkpoint(
    folder: Path, config: Mapping[str, Any] | None, projections: Mapping[str, Mapping[str, Tensor]]
) -> Path:
    """Write a model folder that holds projections by name, a norm and nothing else."""
    folder.mkdir(exist_ok=True)
    content = {"model_type": "llama"}
    if config is not None:
        content["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {
        f"{name}.{suffix}": tensor
        for name, named in projections.items()
        for suffix, tensor in named.items()
    }
    save_file({**tensors, "model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return folder
