"""Quantized weights in int8, int4 and fp8, channel-major: rounding, GPTQ and packing."""

from teal.quantization.gptq import SecondMoments, quantize_by_moments
from teal.quantization.rounding import Scheme, round_to_nearest
from teal.quantization.weight import FLOAT, GROUP_SIZES, QuantizedWeight, side_by_side

__all__ = [
    "FLOAT",
    "GROUP_SIZES",
    "QuantizedWeight",
    "Scheme",
    "SecondMoments",
    "quantize_by_moments",
    "round_to_nearest",
    "side_by_side",
]
