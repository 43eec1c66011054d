"""Statistics of a projection input on text: a histogram of |x| and moments per channel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal.calibration.histogram import Histogram
from teal.foundation.errors import UserError

# Elements converted to float64 at a time, which bounds temporary memory.
_CHUNK = 2**22


@dataclass(frozen=True, kw_only=True)
class ChannelMoments:
    """Sums over tokens, per channel.

    Attributes:
        sum: Sum of x, (in_features,), float64.
        square_sum: Sum of x², (in_features,), float64.
    """

    sum: Tensor
    square_sum: Tensor

    @classmethod
    def zeros(cls, in_features: int) -> "ChannelMoments":
        """Return the sums of an empty set of tokens."""
        zeros = torch.zeros(in_features, dtype=torch.float64)
        return cls(sum=zeros, square_sum=zeros.clone())

    @classmethod
    def of(cls, x: Tensor) -> "ChannelMoments":
        """Sum in float64 over the rows of `x`, (rows, in_features), on its device."""
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        squares = total.clone()
        step = max(1, _CHUNK // x.shape[1])
        for begin in range(0, len(x), step):
            exact = x[begin : begin + step].detach().double()
            total += exact.sum(0)
            squares += exact.square_().sum(0)
        return cls(sum=total.cpu(), square_sum=squares.cpu())

    def merge(self, other: "ChannelMoments") -> "ChannelMoments":
        """Return the sums over the tokens of both."""
        return ChannelMoments(
            sum=self.sum + other.sum, square_sum=self.square_sum + other.square_sum
        )


class InputStatistics:
    """Statistics of one input; projections that share an input share its statistics.

    Attributes:
        projections: Full dotted names of the projections that read the input.
        in_features: Number of channels.
        dtype: Dtype of the activations, such as "bfloat16".
        histogram: Distribution of |x| over all channels.
        moments: Sums per channel, or `None` if only a histogram is known.
        count: Number of tokens.
    """

    def __init__(
        self,
        *,
        projections: tuple[str, ...],
        in_features: int,
        dtype: str,
        histogram: Histogram | None = None,
        moments: ChannelMoments | None = None,
        count: int = 0,
    ) -> None:
        self.projections = projections
        self.in_features = in_features
        self.dtype = dtype
        self.histogram = histogram or Histogram(dtype)
        self.moments = moments if count else ChannelMoments.zeros(in_features)
        self.count = count

    @property
    def mean(self) -> Tensor:
        """Mean of x per channel, (in_features,), float64."""
        return self._known_moments().sum / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """Mean of x² per channel, (in_features,), float64."""
        return self._known_moments().square_sum / max(self.count, 1)

    def add(self, x: Tensor) -> None:
        """Add activations.

        Args:
            x: Activations, (rows, in_features), in the dtype of these statistics.

        Raises:
            UserError: An entry is NaN or infinite, or the dtype differs.
        """
        dtype = str(x.dtype).removeprefix("torch.")
        if dtype != self.dtype:
            raise UserError(
                f"The input of {self._names} is {dtype}, not {self.dtype}. "
                "Run the whole calibration in one dtype."
            )
        moments = ChannelMoments.of(x)
        # The square of a finite float32 never overflows a float64, so this finds every NaN and inf.
        if not bool(moments.square_sum.isfinite().all()):
            raise UserError(
                f"The input of {self._names} holds NaN or inf in {self.dtype}. {self._cure}"
            )
        self.moments = self._known_moments().merge(moments)
        self.histogram.add(x)
        self.count += len(x)

    def quantile(self, sparsity: float) -> float:
        """Return the value that a fraction `sparsity` of all |x| does not exceed.

        Args:
            sparsity: Fraction in [0, 1).

        Raises:
            UserError: `sparsity` is out of range, or nothing has been counted.
        """
        return self.histogram.quantile(sparsity)

    def merge(self, other: "InputStatistics") -> "InputStatistics":
        """Return the statistics of the tokens of both, with moments only if both have them.

        Raises:
            UserError: The inputs or dtypes differ.
        """
        mine, theirs = (self.projections, self.in_features), (other.projections, other.in_features)
        if mine != theirs:
            raise UserError(
                f"Cannot merge the input of {self._names} with that of {other._names}. "
                "Merge statistics of one model."
            )
        has_moments = self.moments is not None and other.moments is not None
        return InputStatistics(
            projections=self.projections,
            in_features=self.in_features,
            dtype=self.dtype,
            histogram=self.histogram.merge(other.histogram),
            moments=self._known_moments().merge(other._known_moments()) if has_moments else None,
            count=self.count + other.count,
        )

    def _known_moments(self) -> ChannelMoments:
        if self.moments is None:
            raise UserError(
                f"The statistics of {self._names} are a histogram alone, without channel moments. "
                "Calibrate the model on a text."
            )
        return self.moments

    @property
    def _names(self) -> str:
        return ", ".join(self.projections)

    @property
    def _cure(self) -> str:
        if self.dtype == "float16":
            return "Calibrate in bfloat16 or float32, which reach further than float16."
        return "Check that the model's weights are whole."
