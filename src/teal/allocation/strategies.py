"""The allocation strategies by name, and the step from statistics to a plan."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import nn

from teal.allocation.block_search import GreedySettings
from teal.allocation.budget import AllocationRequest, plan_from_sparsities
from teal.allocation.greedy import greedy_sparsities
from teal.allocation.uniform import uniform_sparsities
from teal.calibration.artifact import CalibrationStats
from teal.data import TokenWindows
from teal.foundation.errors import UserError, check_sparsity, unknown_name
from teal.methods import method_named
from teal.plan import SparsityPlan

# A strategy returns the sparsity of every planned projection. It is called for many budgets in
# turn, so expensive work belongs in the statistics, where the greedy path is kept.
Strategy = Callable[[AllocationRequest], dict[str, float]]

STRATEGIES: dict[str, Strategy] = {"greedy": greedy_sparsities, "uniform": uniform_sparsities}

# Between points this close, interpolated thresholds are accurate to 0.1 points of sparsity.
_POINTS = tuple(percent / 100 for percent in range(1, 100))


def allocate(
    stats: CalibrationStats,
    *,
    sparsity: float,
    strategy: str = "uniform",
    method: str = "teal",
    target_modules: Sequence[str] | None = None,
    model: nn.Module | None = None,
    tokens: TokenWindows | None = None,
    settings: GreedySettings | None = None,
) -> SparsityPlan:
    """Distribute a sparsity budget over the projections and make a plan of it.

    The path of the plan holds the allocation at every percent that the strategy reaches, so that
    `SparsityPlan.at` needs no statistics.

    Args:
        stats: Calibration statistics. The greedy strategy stores its path in them; once it is
            there, neither `model` nor `tokens` is needed.
        sparsity: Budget in [0, 1): mean over the planned projections, weighted by weight size.
        strategy: Name in `STRATEGIES`.
        method: Name in `METHODS`.
        target_modules: Suffixes of projection names, or regular expressions; `None` is all.
        model: Model to run the greedy search on.
        tokens: Text on which the greedy search measures the error.
        settings: Settings of the greedy search.

    Raises:
        UserError: The sparsity is out of range; the strategy, method or a target module is
            unknown; the statistics belong to another model; or the greedy strategy has neither a
            path nor a model.
    """
    check_sparsity(sparsity)
    method_named(method)
    request = AllocationRequest(
        stats=stats,
        sparsity=sparsity,
        method=method,
        target_modules=target_modules,
        model=model,
        tokens=tokens,
        settings=settings,
    )
    chosen = strategy_named(strategy)(request)
    return plan_from_sparsities(
        stats,
        chosen,
        method=method,
        strategy=strategy,
        target_sparsity=sparsity,
        points={0.0: dict.fromkeys(chosen, 0.0), **_points(strategy_named(strategy), request)},
    )


def strategy_named(name: str) -> Strategy:
    """Return the registered strategy `name`.

    Raises:
        UserError: There is none.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]


def register_strategy(name: str, strategy: Strategy) -> None:
    """Make a strategy available under `name`.

    Args:
        name: New name, as given to `allocate`.
        strategy: Function from a request to the sparsity of every planned projection.

    Raises:
        ValueError: The name is taken.
    """
    if name in STRATEGIES:
        raise ValueError(f"A strategy named {name!r} is already registered.")
    STRATEGIES[name] = strategy


def _points(strategy: Strategy, request: AllocationRequest) -> dict[float, dict[str, float]]:
    """Return the allocation at every point that the strategy can reach."""
    points = {}
    for sparsity in _POINTS:
        with suppress(UserError):
            chosen = strategy(replace(request, sparsity=sparsity))
            points[sparsity] = {name: check_sparsity(value) for name, value in chosen.items()}
    return points
