"""A streaming histogram of |x| with quantiles at any scale, in a fixed amount of memory."""

import math

import torch
from torch import Tensor

from teal.foundation.errors import UserError, check_sparsity

LOWEST = 2.0**-44
HIGHEST = 2.0**20
NUM_BINS = 512 * 64 + 2

# A bin distinguishes the upper 9 of the 23 mantissa bits of a float32, so it spans 2^14 values.
_MANTISSA_BITS = 23
_BIN_BITS = 14
_LAST = NUM_BINS - 1
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Values binned at a time, which bounds temporary memory.
_CHUNK = 2**22


class Histogram:
    """Counts of |x| in bins of equal width in the float32 bit pattern, 512 per octave.

    The first bin holds values below 2^-44, mainly exact zeros; the last one 2^20 and above.

    Attributes:
        dtype: Float dtype of the values, such as "bfloat16". If it is coarser than the bins, as
            bfloat16 is, thresholds fall half way between two representable values (atoms).
        counts: Number of values per bin, (bins,), float64.
    """

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in _DTYPES:
            raise UserError(
                f"Activations of dtype {dtype!r} cannot be calibrated. "
                f"Load the model in one of {', '.join(_DTYPES)}."
            )
        self.dtype = dtype
        self.counts = torch.zeros(NUM_BINS, dtype=torch.float64)

    @classmethod
    def from_counts(cls, dtype: str, first_bin: int, counts: Tensor) -> "Histogram":
        """Rebuild a histogram from its occupied range.

        Args:
            dtype: Float dtype of the values.
            first_bin: Index of the first bin of the range.
            counts: Counts of the range, (bins in range,), float64.

        Raises:
            ValueError: The range exceeds the bins, or a count is not a number ≥ 0.
        """
        if first_bin < 0 or counts.dim() != 1 or first_bin + len(counts) > NUM_BINS:
            raise ValueError(f"no bins {first_bin} … {first_bin} + {tuple(counts.shape)}")
        if not bool((counts >= 0).all()):
            raise ValueError("a count is not a number ≥ 0")
        histogram = cls(dtype)
        histogram.counts[first_bin : first_bin + len(counts)] = counts
        return histogram

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, (bins + 1,), float64, from 0 to infinity."""
        bits = _start(1) + (torch.arange(_LAST, dtype=torch.int32) << _BIN_BITS)
        zero, infinity = torch.tensor([[0.0], [math.inf]], dtype=torch.float64)
        return torch.cat([zero, bits.view(torch.float32).double(), infinity])

    @property
    def total(self) -> float:
        """Number of values counted."""
        return float(self.counts.sum())

    def occupied(self) -> tuple[int, Tensor]:
        """Return the index of the first non-empty bin, and the counts up to the last one."""
        bins = self.counts.nonzero().flatten()
        if not len(bins):
            return 0, self.counts[:0]
        first, last = int(bins[0]), int(bins[-1])
        return first, self.counts[first : last + 1]

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Count |values|, binning on their device.

        Args:
            values: Activations or scores, any shape, any float dtype, finite.
            weights: Weight of each value, in the shape of `values`; `None` counts each once.
        """
        flat = values.detach().flatten()
        for begin in range(0, len(flat), _CHUNK):
            chunk = slice(begin, begin + _CHUNK)
            bits = flat[chunk].float().abs().view(torch.int32)
            bins = ((bits >> _BIN_BITS) - (_start(0) >> _BIN_BITS)).clamp_(0, _LAST)
            weight = None if weights is None else weights.flatten()[chunk]
            self.counts += torch.bincount(bins, weight, minlength=NUM_BINS).to("cpu", torch.float64)

    def merge(self, other: "Histogram") -> "Histogram":
        """Return the histogram of the values of both.

        Raises:
            UserError: The dtypes differ.
        """
        if self.dtype != other.dtype:
            raise UserError(
                f"Cannot merge statistics in {self.dtype} with statistics in {other.dtype}. "
                "Calibrate both in one dtype."
            )
        return Histogram.from_counts(self.dtype, 0, self.counts + other.counts)

    def quantile(self, sparsity: float) -> float:
        """Return a value t such that the fraction of |x| ≤ t is nearest to `sparsity`.

        Values are assumed to be evenly distributed within a bin, over its atoms if the dtype is
        coarse. The result lies half way to the next atom, so it drops the same fraction in a run
        with another dtype.

        Args:
            sparsity: Fraction in [0, 1).

        Returns:
            A float32 value: 0.0 within the first bin, 2^20 within the last.

        Raises:
            UserError: `sparsity` is out of range, or nothing has been counted.
        """
        cumulative = self.counts.cumsum(0)
        target = check_sparsity(sparsity) * _require_values(float(cumulative[-1]))
        index = int(torch.searchsorted(cumulative, target))
        if index == 0:
            return 0.0
        if index == _LAST:
            return HIGHEST
        share = (target - float(cumulative[index - 1])) / float(self.counts[index])
        step = self._atom_step(index)
        dropped = round(share * _atoms_per_bin(step))
        return _float_of(_start(index) + dropped * step - (step + 1) // 2)

    def cdf(self, threshold: float) -> float:
        """Return the fraction of |x| ≤ `threshold`, compared in float32.

        Raises:
            UserError: Nothing has been counted.
        """
        total = _require_values(self.total)
        if threshold < 0.0:
            return 0.0
        bits = _bits_of(threshold)
        index = min(max((bits - _start(0)) >> _BIN_BITS, 0), _LAST)
        if index == 0 or math.isinf(threshold):
            share = 1.0
        elif index == _LAST:
            share = 0.0
        else:
            step = self._atom_step(index)
            share = min(1.0, ((bits - _start(index)) // step + 1) / _atoms_per_bin(step))
        dropped = float(self.counts[:index].sum()) + share * float(self.counts[index])
        return dropped / total

    def _atom_step(self, index: int) -> int:
        """Return the distance between adjacent values of the dtype, in float32 bit patterns."""
        limits = torch.finfo(_DTYPES[self.dtype])
        # Subnormals in this range exist only in float16, and there is at most one per bin.
        if _start(index) < _bits_of(limits.smallest_normal):
            return 1 << _BIN_BITS
        return 1 << (_MANTISSA_BITS + round(math.log2(limits.eps)))


def _require_values(total: float) -> float:
    if not total:
        raise UserError("The statistics are empty. Calibrate with a text.")
    return total


def _start(index: int) -> int:
    """Return the float32 bit pattern of the lower edge of a bin; bin 1 begins at 2^-44."""
    return _bits_of(LOWEST) + ((index - 1) << _BIN_BITS)


def _atoms_per_bin(step: int) -> int:
    return max(1, (1 << _BIN_BITS) // step)


def _bits_of(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _float_of(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
