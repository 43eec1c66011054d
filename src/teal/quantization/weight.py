"""One weight of few bits, laid out so that an input channel is one contiguous strip."""

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

# What a weight is that has none of them.
FLOAT = "float"

# Input channels that may share a scale, besides all of them.
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A channel-major weight `(code - zero) · scale`, its format told by the dtype of its codes.

    Attributes:
        codes: int8 or float8_e4m3fn (in_features, out_features), or uint8 with two neighbouring
            int4 columns per byte, (in_features, ⌈out_features / 2⌉).
        scales: One per group and output, (groups, out_features), float; none is zero.
        group_size: Input channels per group; the last group may be shorter. in_features where
            there is one scale per output.
        zeros: Code of zero per group and output, (groups, out_features), uint8; `None` where all
            codes are centred. int4 only.
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
        """Pack int4 codes; zeros that are all in the middle are left out.

        Args:
            unsigned: Codes from 0 to 15, (in_features, out_features), uint8.
            scales: (groups, out_features).
            group_size: Input channels per group.
            zeros: (groups, out_features), uint8, or `None`.
        """
        if zeros is not None and bool((zeros == INT4_MIDDLE).all()):
            zeros = None
        codes = pack_nibbles(unsigned)
        return cls(codes=codes, scales=scales, group_size=group_size, zeros=zeros)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], group_size: int) -> "QuantizedWeight":
        """Rebuild from `tensors` and the group size."""
        return cls(
            codes=tensors["codes"],
            scales=tensors["scales"],
            zeros=tensors.get("zeros"),
            group_size=group_size,
        )

    @property
    def format(self) -> str:
        """One of "fp8", "int4" and "int8"."""
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
        """Return all tensors by name, as they are saved."""
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def integers(self) -> Tensor:
        """Return the codes one by one: int4 as 0 … 15 in uint8, (in_features, out_features)."""
        is_packed = self.format == "int4"
        return unpack_nibbles(self.codes, self.out_features) if is_packed else self.codes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight as floats, channel-major, (in_features, out_features)."""
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
    """Return `group_size` if a weight with `in_features` inputs may have it.

    Raises:
        UserError: It may not.
    """
    if group_size not in (*GROUP_SIZES, in_features):
        raise UserError(
            f"Group size {group_size} is not supported. Supported: "
            f"{', '.join(map(str, GROUP_SIZES))}, and all {in_features} inputs."
        )
    return group_size


def side_by_side(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Join weights that share their input into one, their outputs beside each other.

    Args:
        weights: At least one, of one format, group size and device.

    Returns:
        The same values, (in_features, sum of out_features).

    Raises:
        UserError: They differ in format, inputs or group size.
    """
    first = weights[0]
    kinds = {(weight.format, weight.in_features, weight.group_size) for weight in weights}
    if len(kinds) > 1:
        shown = ", ".join(f"{f} of {i} inputs in groups of {g}" for f, i, g in sorted(kinds))
        raise UserError(f"Weights of unlike kinds cannot be joined: {shown}. Quantize them alike.")
    scales = torch.cat([weight.scales for weight in weights], dim=1)
    # Codes one by one, because a weight of odd width ends within a byte.
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
