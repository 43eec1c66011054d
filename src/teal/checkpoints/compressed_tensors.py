"""Reading and writing the compressed-tensors layout, which transformers and vLLM read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.reference.quantized import FP8, INT4_MIDDLE, INT8
from teal.quantization.packing import pack_words, unpack_words
from teal.quantization.rounding import Scheme
from teal.quantization.weight import QuantizedWeight

METHOD = "compressed-tensors"

_PACKED = "pack-quantized"
_FLOAT = "float-quantized"
# Formats that store codes as a plain matrix.
_PLAIN = ("int-quantized", _FLOAT, "naive-quantized")
_BITS = {"fp8": 8, "int4": 4, "int8": 8}
_SUPPORTED = (
    "int weights of 4 or 8 bits and float weights of 8, with one scale per tensor, output or "
    "group, in the formats 'pack-quantized', 'int-quantized', 'float-quantized' and "
    "'naive-quantized'"
)
_DAMAGED = "The checkpoint is damaged; download it anew."
# XOR with it converts codes 0 … 255 to -128 … 127 and back.
_SIGN_BIT = 128


@dataclass(frozen=True, kw_only=True)
class _WeightGroup:
    """One entry of `config_groups` in a `quantization_config`."""

    targets: Sequence[str]
    is_packed: bool
    bits: int
    group_size: int | None
    is_symmetric: bool

    def covers(self, name: str) -> bool:
        return any(_matches(name, target) for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class CompressedLayout:
    """The layout of compressed-tensors; settings of activation quantization are ignored.

    Attributes:
        groups: Configuration groups; the first one that covers a projection applies.
    """

    groups: Sequence[_WeightGroup]

    marker: ClassVar[str] = "weight_scale"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CompressedLayout":
        """Read a `quantization_config`.

        Raises:
            UserError: A group is of an unsupported kind.
        """
        groups = [
            _weight_group(group, str(config.get("format")))
            for group in config["config_groups"].values()
        ]
        return cls(groups=groups)

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Assemble a projection.

        Args:
            name: Dotted module name.
            tensors: weight, (out_features, in_features), or weight_packed and weight_shape;
                weight_scale; and weight_zero_point if the codes have zeros.

        Raises:
            UserError: The tensors do not fit together, or no group covers the name.
        """
        group = next((group for group in self.groups if group.covers(name)), None)
        if group is None:
            raise UserError("No config group covers it. Correct quantization_config.")
        stored = _unpacked(tensors, group.bits) if group.is_packed else tensors["weight"]
        scales = _scales(tensors["weight_scale"], len(stored))
        codes = stored.T.contiguous()
        group_size = group.group_size or len(codes)
        if group.bits == _BITS["int4"]:
            zeros = None if group.is_symmetric else _zeros(tensors, scales)
            return QuantizedWeight.of_int4(codes, scales, group_size, zeros)
        if group.is_packed:
            codes = (codes ^ _SIGN_BIT).view(INT8)
        if codes.dtype not in (FP8, INT8):
            raise UserError(f"Its weight is {codes.dtype}, not quantized. {_DAMAGED}")
        return QuantizedWeight(codes=codes, scales=scales, group_size=group_size)


def compressed_tensors(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors of a projection by suffix of its module name.

    Args:
        weight: The quantized weight.
        scheme: Scheme it was quantized with, as given to `compressed_config`.
    """
    named = {"weight_scale": weight.scales.T.contiguous()}
    if weight.format == "fp8":
        return {"weight": weight.codes.T.contiguous(), **named}
    integers = weight.integers()
    unsigned = integers if weight.format == "int4" else integers.view(torch.uint8) ^ _SIGN_BIT
    bits = _BITS[weight.format]
    named["weight_packed"] = pack_words(unsigned.T.contiguous(), bits)
    named["weight_shape"] = torch.tensor([weight.out_features, weight.in_features])
    if not scheme.symmetric:
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full(weight.scales.shape, INT4_MIDDLE, dtype=torch.uint8)
        named["weight_zero_point"] = pack_words(zeros, bits).T.contiguous()
    return named


def compressed_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a quantized model.

    Args:
        scheme: Scheme its projections were quantized with.
        ignore: Dotted names of linear layers that are not quantized.
    """
    # int8 is packed too: vLLM expects quantized activations with "int-quantized".
    layout = _FLOAT if scheme.format == "fp8" else _PACKED
    weights = {
        "num_bits": _BITS[scheme.format],
        "type": "float" if scheme.format == "fp8" else "int",
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "dynamic": False,
    }
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignore),
    }


def _weight_group(group: Mapping[str, Any], common_format: str) -> _WeightGroup:
    weights = group["weights"]
    layout = group.get("format") or common_format
    kind = (weights["type"], weights["num_bits"])
    is_known = kind in (("int", 4), ("int", 8), ("float", 8))
    is_placed = layout == _PACKED if kind == ("int", 4) else layout in (_PACKED, *_PLAIN)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    is_symmetric = weights.get("symmetric", True)
    if not (is_known and is_placed and strategy in ("tensor", "channel", "group")):
        raise UserError(
            f"{METHOD} with {weights['type']} weights of {weights['num_bits']} bits, scales per "
            f"{strategy}, in the format {layout!r} is not supported. Supported: {_SUPPORTED}."
        )
    if weights.get("actorder") in (True, "group", "dynamic"):
        raise UserError(
            "Its input channels are reordered (actorder 'group'), which spreads a group over the "
            "whole weight. Use a checkpoint with actorder 'weight' or none."
        )
    if not is_symmetric and kind != ("int", 4):
        raise UserError("8-bit codes with zeros are not supported. Quantize symmetrically.")
    return _WeightGroup(
        targets=tuple(group["targets"]),
        is_packed=layout == _PACKED,
        bits=int(weights["num_bits"]),
        group_size=int(weights["group_size"]) if strategy == "group" else None,
        is_symmetric=bool(is_symmetric),
    )


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    # Every quantized module is a linear layer, so the class name covers all of them.
    return target in ("Linear", name)


def _unpacked(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return unsigned codes, (out_features, in_features), uint8."""
    words = tensors["weight_packed"]
    out_features, in_features = tensors["weight_shape"].tolist()
    expected = (out_features, -(-in_features * bits // 32))
    if words.dtype != torch.int32 or words.shape != expected:
        raise UserError(
            f"Its weight_packed is {words.dtype} {tuple(words.shape)}, which should be int32 "
            f"{expected}. {_DAMAGED}"
        )
    return unpack_words(words, bits, in_features)


def _scales(stored: Tensor, out_features: int) -> Tensor:
    """Return scales, (groups, out_features)."""
    if stored.numel() == 1:
        return stored.reshape(1, 1).repeat(1, out_features)
    if len(stored) != out_features:
        raise UserError(
            f"Its weight_scale has shape {tuple(stored.shape)} for {out_features} outputs. "
            f"{_DAMAGED}"
        )
    return stored.reshape(out_features, -1).T.contiguous()


def _zeros(tensors: Mapping[str, Tensor], scales: Tensor) -> Tensor:
    words = tensors["weight_zero_point"]
    groups, out_features = scales.shape
    expected = (-(-out_features // 8), groups)
    if words.dtype != torch.int32 or words.shape != expected:
        raise UserError(
            f"Its weight_zero_point is {words.dtype} {tuple(words.shape)}, which should be int32 "
            f"{expected}. {_DAMAGED}"
        )
    return unpack_words(words.T, _BITS["int4"], out_features)
