"""A quantized weight, channel-major: the codes of an input channel are contiguous."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.reference.quantized import (
    FP8,
    INT4,
    INT4_MIDDLE,
    INT8,
    dequantized,
    pack_nibbles,
    unpack_nibbles,
)

# Format by the dtype of its codes.
FORMATS: Mapping[torch.dtype, str] = {FP8: "fp8", INT4: "int4", INT8: "int8"}

# Name of the format of weights that are not quantized.
FLOAT = "float"

# Supported numbers of input channels that share a scale, besides all of them.
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A channel-major weight `(code - zero) · scale`; the dtype of its codes tells its format.

    Attributes:
        codes: Codes in int8 or float8_e4m3fn, (in_features, out_features), or in uint8 with two
            neighbouring int4 columns per byte, (in_features, ⌈out_features / 2⌉).
        scales: Scale per group and output, (groups, out_features), float; none is zero.
        group_size: Input channels per group; the last group may be shorter. in_features if there
            is one scale per output.
        zeros: Code of zero per group and output, (groups, out_features), uint8, int4 only; `None`
            for symmetric codes.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype not in FORMATS or self.codes.ndim != 2 or self.scales.ndim != 2:
            raise UserError(
                f"Codes are {self.codes.dtype} {tuple(self.codes.shape)}, scales "
                f"{tuple(self.scales.shape)}. Give two dimensions each, and codes in one of "
                f"{', '.join(str(dtype) for dtype in FORMATS)}."
            )
        checked_group_size(self.group_size, self.in_features)
        groups = -(-self.in_features // self.group_size)
        columns = -(-self.out_features // 2) if self.format == "int4" else self.out_features
        if self.scales.shape[0] != groups or self.codes.shape[1] != columns:
            raise UserError(
                f"Scales {tuple(self.scales.shape)} do not fit codes {tuple(self.codes.shape)} "
                f"in groups of {self.group_size}. Give a row for each of {groups} groups."
            )
        if self.zeros is not None:
            self._check_zeros(self.zeros)
        if not bool((torch.isfinite(self.scales) & (self.scales != 0)).all()):
            raise UserError("Scales hold zero, NaN or infinity. Use undamaged scales.")

    @classmethod
    def of_int4(
        cls, unsigned: Tensor, scales: Tensor, group_size: int, zeros: Tensor | None = None
    ) -> "QuantizedWeight":
        """Pack int4 codes; zeros that all equal the middle code are dropped.

        Args:
            unsigned: Codes from 0 to 15, (in_features, out_features), uint8.
            scales: Scale per group and output, (groups, out_features), float.
            group_size: Input channels per group.
            zeros: Code of zero per group and output, (groups, out_features), uint8, or `None` for
                symmetric codes.
        """
        if zeros is not None and bool((zeros == INT4_MIDDLE).all()):
            zeros = None
        codes = pack_nibbles(unsigned)
        return cls(codes=codes, scales=scales, group_size=group_size, zeros=zeros)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], group_size: int) -> "QuantizedWeight":
        """Rebuild a weight from its `tensors` and its group size."""
        return cls(
            codes=tensors["codes"],
            scales=tensors["scales"],
            zeros=tensors.get("zeros"),
            group_size=group_size,
        )

    @property
    def format(self) -> str:
        """Format: "fp8", "int4" or "int8"."""
        return FORMATS[self.codes.dtype]

    @property
    def in_features(self) -> int:
        """Number of input channels."""
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.scales.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.in_features, self.out_features

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by attribute name, without zeros if there are none."""
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def integers(self) -> Tensor:
        """Return unpacked codes, (in_features, out_features): int4 as 0 … 15 in uint8."""
        is_packed = self.format == "int4"
        return unpack_nibbles(self.codes, self.out_features) if is_packed else self.codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight in a float dtype, channel-major, (in_features, out_features)."""
        return dequantized(self.codes, self.scales, self.zeros, self.group_size, dtype)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the same weight on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return self.from_tensors(moved, self.group_size)

    def _check_zeros(self, zeros: Tensor) -> None:
        if self.format != "int4" or zeros.dtype != INT4 or zeros.shape != self.scales.shape:
            raise UserError(
                f"Zeros are {zeros.dtype} {tuple(zeros.shape)} for an {self.format} weight with "
                f"scales {tuple(self.scales.shape)}. Give uint8 of that shape, for int4 alone."
            )


def checked_group_size(group_size: int, in_features: int) -> int:
    """Return `group_size` if it is supported for a weight with `in_features` inputs.

    Raises:
        UserError: It is not supported.
    """
    if group_size not in (*GROUP_SIZES, in_features):
        raise UserError(
            f"Group size {group_size} is not supported. Supported: "
            f"{', '.join(map(str, GROUP_SIZES))}, and all {in_features} inputs."
        )
    return group_size


def side_by_side(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Concatenate weights that share an input along their outputs.

    Args:
        weights: One or more weights of the same format, group size and device.

    Returns:
        A weight with the same values, (in_features, sum of out_features).

    Raises:
        UserError: The weights differ in format, inputs or group size.
    """
    first = weights[0]
    kinds = {(weight.format, weight.in_features, weight.group_size) for weight in weights}
    if len(kinds) > 1:
        shown = ", ".join(f"{f} of {i} inputs in groups of {g}" for f, i, g in sorted(kinds))
        raise UserError(f"Weights of unlike kinds cannot be joined: {shown}. Quantize them alike.")
    scales = torch.cat([weight.scales for weight in weights], dim=1)
    # Unpacked, because an int4 weight with an odd number of outputs ends within a byte.
    codes = torch.cat([weight.integers().view(torch.uint8) for weight in weights], dim=1)
    if first.format == "int4":
        zeros = torch.cat([_explicit_zeros(weight) for weight in weights], dim=1)
        return QuantizedWeight.of_int4(codes, scales, first.group_size, zeros)
    codes = codes.view(first.codes.dtype)
    return QuantizedWeight(codes=codes, scales=scales, group_size=first.group_size)


def _explicit_zeros(weight: QuantizedWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, INT4_MIDDLE, dtype=INT4)
