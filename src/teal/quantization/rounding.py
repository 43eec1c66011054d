"""Rounding float weights to codes, with a scale and zero fitted per group and output."""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal.foundation.errors import UserError, unknown_name
from teal.kernels.reference.quantized import FP8, INT4_MIDDLE
from teal.quantization.weight import FORMATS, GROUP_SIZES, QuantizedWeight

_DEFAULT_GROUP_SIZE = 128
_LARGEST_INT8 = 127.0
_LARGEST_INT4 = 15.0
_LARGEST_FP8 = torch.finfo(FP8).max


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a weight is quantized.

    Attributes:
        format: "int8", "int4" or "fp8".
        group_size: Input channels that share a scale, int4 only; the default is 128. int8 and fp8
            have one scale per output.
        symmetric: Whether the codes are centred on zero; only int4 supports asymmetric codes.
    """

    format: str
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS.values():
            raise unknown_name("format", self.format, sorted(FORMATS.values()))
        if self.format == "int4":
            if self.group_size is None:
                object.__setattr__(self, "group_size", _DEFAULT_GROUP_SIZE)
            if self.group_size not in GROUP_SIZES:
                raise UserError(
                    f"Group size {self.group_size} is not supported. "
                    f"Supported: {', '.join(map(str, GROUP_SIZES))}."
                )
        elif self.group_size is not None or not self.symmetric:
            raise UserError(
                f"{self.format} has one scale per output and no zeros. Leave out the group size "
                "and asymmetry, or use int4."
            )


@dataclass(frozen=True, eq=False)
class GroupQuantizer:
    """Rounds the weights of one group to codes, with value `(code - zero) · scale`.

    Attributes:
        format: "int8", "int4" or "fp8".
        scales: Scale per output, (out_features,), float.
        zeros: Code of zero per output, (out_features,), uint8; `None` for symmetric codes.
    """

    format: str
    scales: Tensor
    zeros: Tensor | None

    @classmethod
    def fit(cls, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> "GroupQuantizer":
        """Fit scales and zeros to the range of a group's weights.

        Args:
            weight: Weights of the group, (channels, out_features), float32.
            scheme: Format and symmetry.
            dtype: Dtype of the scales; codes are rounded against the scales in this dtype.
        """
        if not scheme.symmetric:
            lowest, highest = weight.amin(0).clamp(max=0), weight.amax(0).clamp(min=0)
            scales = _not_zero((highest - lowest) / _LARGEST_INT4, dtype)
            zeros = (-lowest / scales.float()).round().clamp(0, _LARGEST_INT4)
            return cls(scheme.format, scales, zeros.to(torch.uint8))
        reach = {"int8": _LARGEST_INT8, "int4": _LARGEST_INT4 / 2, "fp8": _LARGEST_FP8}
        return cls(
            scheme.format, _not_zero(weight.abs().amax(0) / reach[scheme.format], dtype), None
        )

    def codes(self, weight: Tensor) -> Tensor:
        """Round to the nearest value.

        Args:
            weight: Weights of the group, (channels, out_features), float32.

        Returns:
            Codes, (channels, out_features): int8, float8_e4m3fn, or int4 as 0 … 15 in uint8.
        """
        steps = weight / self.scales.float()
        if self.format == "fp8":
            return steps.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(FP8)
        if self.format == "int8":
            return steps.round().clamp(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)
        return (steps.round() + self._zero()).clamp(0, _LARGEST_INT4).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`, (channels, out_features), float32."""
        return (codes.float() - self._zero()) * self.scales.float()

    def _zero(self) -> Tensor | float:
        if self.zeros is not None:
            return self.zeros.float()
        return float(INT4_MIDDLE) if self.format == "int4" else 0.0


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round every weight to the nearest code, without using activations.

    Args:
        weight: Channel-major weight, (in_features, out_features), any float dtype; scales take the
            same.
        scheme: Format, group size and symmetry.

    Returns:
        The quantized weight, on the same device.

    Raises:
        UserError: The weight holds NaN or infinity.
    """
    require_finite(weight)
    group_size = scheme.group_size or len(weight)
    quantizers, codes = [], []
    for group in torch.split(weight, group_size):
        quantizers.append(GroupQuantizer.fit(group.float(), scheme, weight.dtype))
        codes.append(quantizers[-1].codes(group.float()))
    return assembled(torch.cat(codes), quantizers, group_size)


def assembled(codes: Tensor, quantizers: list[GroupQuantizer], group_size: int) -> QuantizedWeight:
    """Assemble a weight from its codes and the quantizers of its groups.

    Args:
        codes: Codes, (in_features, out_features), as `GroupQuantizer.codes` returns them.
        quantizers: One per group, in order.
        group_size: Input channels per group.
    """
    scales = torch.stack([quantizer.scales for quantizer in quantizers])
    if quantizers[0].format != "int4":
        return QuantizedWeight(codes=codes, scales=scales, group_size=group_size)
    zeros = [quantizer.zeros for quantizer in quantizers if quantizer.zeros is not None]
    return QuantizedWeight.of_int4(codes, scales, group_size, torch.stack(zeros) if zeros else None)


def require_finite(weight: Tensor) -> None:
    """Check that a weight can be quantized.

    Raises:
        UserError: The weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise UserError("A weight holds NaN or infinity. Quantize an undamaged model.")


def _not_zero(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`, and replace zero scales, whose weights are all zero, by one."""
    rounded = scales.to(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
