"""From statistics to a plan: the strategies by name."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from torch import nn

from teal.allocation.budget import plan_from_sparsities, target_projections
from teal.allocation.greedy import GreedySettings, greedy_path, path_key, sparsities_at
from teal.calibration.allocation_path import AllocationPath
from teal.calibration.artifact import CalibrationStats
from teal.data import TokenWindows
from teal.foundation.errors import UserError, check_sparsity, unknown_name
from teal.methods import method_named
from teal.plan import SparsityPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocationRequest:
    """Everything that a strategy may look at.

    Attributes:
        stats: Calibration statistics.
        sparsity: Budget to meet.
        method: Name of the method.
        target_modules: Projections to plan, or `None` for all.
        model: The model, where the strategy has to run it.
        tokens: Text to run it on.
        settings: How the greedy search runs.
    """

    stats: CalibrationStats
    sparsity: float
    method: str = "teal"
    target_modules: Sequence[str] | None = None
    model: nn.Module | None = None
    tokens: TokenWindows | None = None
    settings: GreedySettings | None = None


# A strategy gives every planned projection its sparsity. It is asked for many budgets in turn, so
# what takes long belongs into the statistics, as the path of the greedy search does.
Strategy = Callable[[AllocationRequest], dict[str, float]]

# Between points this close, interpolated thresholds drop what is asked for to within 0.1 points.
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
    """Spread a sparsity budget over the projections and turn it into a plan.

    The plan's path holds what the strategy chooses at every other percent, as far as it goes, so
    that `SparsityPlan.at` needs no statistics.

    Args:
        stats: Calibration statistics. The greedy strategy keeps its path in them, and needs
            neither `model` nor `tokens` once it is there.
        sparsity: Budget in [0, 1): the mean over planned projections, weighted by weight size.
        strategy: One of `STRATEGIES`.
        method: One of `METHODS`.
        target_modules: Suffixes of projection names, or regular expressions; `None` is all.
        model: For the greedy strategy: the model.
        tokens: For the greedy strategy: text to measure the harm on.
        settings: For the greedy strategy: step size and the like.

    Raises:
        UserError: Sparsity out of range, unknown strategy, method or module, another model's
            statistics, or no path and no model.
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


def uniform(request: AllocationRequest) -> dict[str, float]:
    """Give every projection the sparsity that the whole model has to reach."""
    names = target_projections(request.stats, request.target_modules)
    return dict.fromkeys(names, request.sparsity)


def greedy(request: AllocationRequest) -> dict[str, float]:
    """Read every projection's sparsity off the greedy path, running the search where needed."""
    return sparsities_at(_path(request), request.sparsity)


STRATEGIES: dict[str, Strategy] = {"greedy": greedy, "uniform": uniform}


def strategy_named(name: str) -> Strategy:
    """Return the strategy `name`.

    Raises:
        UserError: There is none.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]


def register_strategy(name: str, strategy: Strategy) -> None:
    """Make a strategy available under `name`.

    Raises:
        ValueError: The name is taken.
    """
    if name in STRATEGIES:
        raise ValueError(f"A strategy named {name!r} is already registered.")
    STRATEGIES[name] = strategy


def _points(strategy: Strategy, request: AllocationRequest) -> dict[float, dict[str, float]]:
    """Return what the strategy chooses at every point that it can reach."""
    points = {}
    for sparsity in _POINTS:
        with suppress(UserError):
            chosen = strategy(replace(request, sparsity=sparsity))
            points[sparsity] = {name: check_sparsity(value) for name, value in chosen.items()}
    return points


def _path(request: AllocationRequest) -> AllocationPath:
    paths = request.stats.paths
    known = paths.get("greedy")
    if request.model is None or request.tokens is None:
        return _require_path(known, request)
    settings = request.settings or GreedySettings()
    key = path_key(request.tokens, request.method, request.target_modules)
    if known is None or known.settings != asdict(settings) | key:
        known = paths["greedy"] = greedy_path(
            request.model,
            request.stats,
            request.tokens,
            method=request.method,
            target_modules=request.target_modules,
            settings=settings,
        )
    return known


def _require_path(path: AllocationPath | None, request: AllocationRequest) -> AllocationPath:
    if path is None:
        raise UserError(
            "The statistics hold no greedy path yet. Give the model and a text once (--model, "
            "--text); later plans read the path from the statistics."
        )
    wanted = None if request.target_modules is None else list(request.target_modules)
    if (path.settings["method"], path.settings["target_modules"]) != (request.method, wanted):
        raise UserError(
            f"The greedy path was made for method {path.settings['method']!r} and target modules "
            f"{path.settings['target_modules']}. Give the model and a text to make it anew."
        )
    return path
