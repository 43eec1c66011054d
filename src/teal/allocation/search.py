"""Search for the highest sparsity whose cost in perplexity stays below a bound."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from teal.foundation.errors import UserError


@dataclass(frozen=True)
class SearchStep:
    """One trial of the bisection.

    Attributes:
        sparsity: Sparsity tried.
        increase: Relative increase of perplexity over dense.
        is_within: Whether the increase is allowed.
    """

    sparsity: float
    increase: float
    is_within: bool


def search_sparsity(
    increase_at: Callable[[float], float],
    allowed: float,
    *,
    highest: float = 0.9,
    resolution: float = 0.005,
) -> Iterator[SearchStep]:
    """Bisect for the highest sparsity that costs at most `allowed`.

    Perplexity is assumed to grow with sparsity. The result is the highest sparsity among the
    steps that are within the bound; there may be none.

    Args:
        increase_at: Measures the relative increase of perplexity at a sparsity, 0.02 for 2 %.
        allowed: Largest increase allowed.
        highest: Highest sparsity to try.
        resolution: Width of the bracket at which the search ends.

    Yields:
        Every trial, in order.

    Raises:
        UserError: `allowed` is not positive.
    """
    if not allowed > 0.0:
        raise UserError(
            f"Allowed perplexity increase {allowed!r} is not positive. Give 0.02 for 2 %."
        )
    low, high = 0.0, highest
    while high - low > resolution:
        middle = (low + high) / 2
        increase = increase_at(middle)
        is_within = increase <= allowed
        low, high = (middle, high) if is_within else (low, middle)
        yield SearchStep(middle, increase, is_within)
