"""The layouts of AWQ and GPTQ checkpoints, which pack codes and zeros into 32-bit words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.quantization.packing import WORD_BITS, unpack_words
from teal.quantization.weight import QuantizedWeight, checked_group_size

# Nibble of a word that holds each column; from the lowest bits up, a word holds the columns
# 0, 2, 4, 6, 1, 3, 5, 7.
_AWQ_POSITIONS = [0, 4, 1, 5, 2, 6, 3, 7]
_AWQ_BITS = 4
_GPTQ_BITS = (4, 8)
_INT8_MIDDLE = 128


@dataclass(frozen=True, kw_only=True)
class AwqLayout:
    """The "gemm" layout of AWQ: words along the outputs, with interleaved columns.

    Attributes:
        group_size: Input channels per group, or -1 for all.
    """

    group_size: int

    marker: ClassVar[str] = "qweight"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AwqLayout":
        """Read a `quantization_config`.

        Raises:
            UserError: The codes are not 4-bit or the layout is not "gemm".
        """
        bits, version = config.get("bits"), str(config.get("version", "gemm")).lower()
        if bits != _AWQ_BITS or version != "gemm":
            raise UserError(
                f"AWQ with {bits!r} bits in layout {version!r} is not supported. "
                "Supported: 4 bits in layout 'gemm'."
            )
        return cls(group_size=int(config["group_size"]))

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Assemble a projection.

        Args:
            name: Dotted module name.
            tensors: qweight, (in_features, out_features / 8), and qzeros,
                (groups, out_features / 8), both int32, and scales, (groups, out_features), float.

        Raises:
            UserError: The tensors do not fit together.
        """
        del name
        scales, qweight = tensors["scales"], _words(tensors, "qweight")
        group_size = _resolved(self.group_size, len(qweight))
        if len(qweight) % group_size:
            raise UserError(
                f"qweight has {len(qweight)} input channels, no multiple of the group size "
                f"{group_size}. The checkpoint is damaged; download it anew."
            )
        groups, columns = len(qweight) // group_size, 8 * qweight.shape[1]
        _require(scales, "scales", (groups, columns))
        qzeros = _require(_words(tensors, "qzeros"), "qzeros", (groups, qweight.shape[1]))
        zeros = _in_order(qzeros)
        return QuantizedWeight.of_int4(_in_order(qweight), scales, group_size, zeros)


@dataclass(frozen=True, kw_only=True)
class GptqLayout:
    """The layout of GPTQ: codes in words along the inputs, zeros in words along the outputs.

    Attributes:
        bits: Bits per code, 4 or 8.
        group_size: Input channels per group, or -1 for all.
        zero_offset: Number to add to the stored zeros: 1 in version 1, 0 in version 2.
        reorders: Whether input channels may be reordered before grouping (act-order).
    """

    bits: int
    group_size: int
    zero_offset: int
    reorders: bool

    marker: ClassVar[str] = "qweight"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GptqLayout":
        """Read a `quantization_config`.

        Raises:
            UserError: The codes are neither 4- nor 8-bit, or the format is neither version 1 nor 2.
        """
        version = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        offsets = {"gptq": 1, "gptq_v2": 0}
        if config.get("bits") not in _GPTQ_BITS or version not in offsets:
            raise UserError(
                f"GPTQ with {config.get('bits')!r} bits in format {version!r} is not supported. "
                "Supported: 4 and 8 bits in formats 'gptq' and 'gptq_v2'."
            )
        return cls(
            bits=int(config["bits"]),
            group_size=int(config["group_size"]),
            zero_offset=offsets[version],
            reorders=bool(config.get("desc_act", False)),
        )

    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Assemble a projection.

        Args:
            name: Dotted module name.
            tensors: qweight, (in_features · bits / 32, out_features), qzeros,
                (groups, out_features · bits / 32), and g_idx, (in_features,), all int32, and
                scales, (groups, out_features), float.

        Raises:
            UserError: The tensors do not fit together, the input channels are reordered
                (act-order), or 8-bit codes are not symmetric.
        """
        del name
        per_word = WORD_BITS // self.bits
        qweight, scales = _words(tensors, "qweight"), tensors["scales"]
        in_features, out_features = per_word * len(qweight), qweight.shape[1]
        group_size = _resolved(self.group_size, in_features)
        groups = -(-in_features // group_size)
        self._require_own_order(tensors, in_features, group_size)
        _require(scales, "scales", (groups, out_features))
        qzeros = _require(
            _words(tensors, "qzeros"), "qzeros", (groups, -(-out_features // per_word))
        )
        unsigned = unpack_words(qweight.T, self.bits, in_features).T.contiguous()
        # A stored zero plus 1 wraps around within its bits, as in AutoGPTQ.
        zeros = unpack_words(qzeros, self.bits, out_features) + self.zero_offset
        if self.bits == 4:
            return QuantizedWeight.of_int4(unsigned, scales, group_size, zeros & 0xF)
        if not bool((zeros == _INT8_MIDDLE).all()):
            raise UserError("8-bit codes with zeros are not supported. Quantize with sym=True.")
        codes = (unsigned ^ _INT8_MIDDLE).view(torch.int8)
        return QuantizedWeight(codes=codes, scales=scales, group_size=group_size)

    def _require_own_order(
        self, tensors: Mapping[str, Tensor], in_features: int, group_size: int
    ) -> None:
        if "g_idx" in tensors:
            own = torch.arange(in_features) // group_size
            is_own = torch.equal(_require(tensors["g_idx"], "g_idx", (in_features,)).long(), own)
        else:
            is_own = not self.reorders
        if not is_own:
            raise UserError(
                "Its input channels are reordered (act-order, desc_act=True), which spreads a "
                "group over the whole weight. Use a checkpoint with desc_act=False."
            )


def _in_order(words: Tensor) -> Tensor:
    """Unpack words along the outputs and undo the interleaving: (rows, columns), uint8."""
    columns = 8 * words.shape[1]
    interleaved = unpack_words(words, _AWQ_BITS, columns).view(len(words), -1, 8)
    return interleaved[..., _AWQ_POSITIONS].flatten(1)


def _resolved(group_size: int, in_features: int) -> int:
    return in_features if group_size == -1 else checked_group_size(group_size, in_features)


def _words(tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    words = tensors[suffix]
    if words.dtype != torch.int32 or words.ndim != 2 or not words.numel():
        raise UserError(
            f"{suffix} is {words.dtype} {tuple(words.shape)}, not a matrix of int32. "
            "The checkpoint is damaged; download it anew."
        )
    return words


def _require(tensor: Tensor, suffix: str, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape:
        raise UserError(
            f"{suffix} has shape {tuple(tensor.shape)}, which should be {shape}. "
            "The checkpoint is damaged; download it anew."
        )
    return tensor
