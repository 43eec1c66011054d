"""GPTQ (arXiv 2210.17323): rounding that compensates its error on the remaining channels."""

import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.quantization.rounding import GroupQuantizer, Scheme, assembled, require_finite
from teal.quantization.weight import QuantizedWeight

# Added to the diagonal of the second moments, relative to its mean (section 3.3, step 3), and the
# largest value to try while they are singular.
_DAMPING = 0.01
_MOST_DAMPING = 1.0

# Channels between two updates of the remaining weight, unless groups are smaller.
_BLOCK = 128


class SecondMoments:
    """Running sum of x xᵀ over the activations of one projection input.

    Args:
        in_features: Number of input channels.
        device: Device of the sum.

    Attributes:
        total: Sum over all rows, (in_features, in_features), float32.
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)

    def add(self, x: Tensor) -> None:
        """Add activations, (..., in_features), any float dtype; summed in float32."""
        rows = x.flatten(0, -2).float()
        self.total.addmm_(rows.T, rows)


def quantize_by_moments(weight: Tensor, moments: SecondMoments, scheme: Scheme) -> QuantizedWeight:
    """Quantize a weight so that its product with the observed activations changes little.

    Channels are rounded in their own order (no act-order). All arithmetic is in float32.

    Args:
        weight: Channel-major weight, (in_features, out_features), any float dtype; scales take the
            same.
        moments: Second moments of the projection's input, on the device of the weight.
        scheme: Format, group size and symmetry.

    Returns:
        The quantized weight, on the same device.

    Raises:
        UserError: The weight or the activations hold NaN or infinity.
    """
    require_finite(weight)
    spread = _error_spread(moments.total)
    rest = weight.float().clone()
    # A channel that is never active does not change the product; zero quantizes exactly.
    rest[moments.total.diagonal() == 0] = 0
    group_size = scheme.group_size or len(rest)
    quantizer = GroupQuantizer.fit(rest, scheme, weight.dtype)
    quantizers, codes = [], []
    for start in range(0, len(rest), min(group_size, _BLOCK)):
        stop = min(start + min(group_size, _BLOCK), len(rest))
        if scheme.group_size:
            quantizer = GroupQuantizer.fit(rest[start:stop], scheme, weight.dtype)
        if start % group_size == 0:
            quantizers.append(quantizer)
        inner = spread[start:stop, start:stop]
        block_codes, errors = _round_block(rest[start:stop], inner, quantizer)
        rest[stop:] -= spread[start:stop, stop:].T @ errors
        codes.append(block_codes)
    return assembled(torch.cat(codes), quantizers, group_size)


def _round_block(block: Tensor, spread: Tensor, quantizer: GroupQuantizer) -> tuple[Tensor, Tensor]:
    """Round channels one by one; return their codes and the errors to spread over later channels.

    Both are (channels, out_features).
    """
    block = block.clone()
    codes, errors = [], []
    for index in range(len(block)):
        channel = block[index : index + 1]
        codes.append(quantizer.codes(channel))
        errors.append((channel - quantizer.values(codes[-1])) / spread[index, index])
        block[index + 1 :] -= spread[index, index + 1 :, None] * errors[-1]
    return torch.cat(codes), torch.cat(errors)


def _error_spread(total: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped second moments."""
    if not bool(torch.isfinite(total).all()):
        raise UserError("Activations hold NaN or infinity. Use another dtype, such as float32.")
    diagonal = total.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(total.dtype).tiny)
    damping = _DAMPING
    while damping <= _MOST_DAMPING:
        damped = total + torch.diag(torch.where(diagonal == 0, mean, damping * mean))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            spread: Tensor
            spread, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return spread
        damping *= 10
    raise UserError("The second moments of the activations are singular. Use more or other text.")
