"""The sparsity budget: what is asked for, which projections count, and the plan it becomes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from teal.allocation.block_search import GreedySettings
from teal.calibration.artifact import CalibrationStats
from teal.data import TokenWindows
from teal.foundation.errors import UserError
from teal.foundation.version import __version__
from teal.methods import method_named
from teal.methods.rule_path import Planned, RulePath
from teal.plan import PlannedProjection, SparsityPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocationRequest:
    """The input of a strategy.

    Attributes:
        stats: Calibration statistics.
        sparsity: Budget to meet.
        method: Name of the method.
        target_modules: Projections to plan, or `None` for all.
        model: The model, if the strategy has to run it.
        tokens: Text to run the model on.
        settings: Settings of the greedy search.
    """

    stats: CalibrationStats
    sparsity: float
    method: str = "teal"
    target_modules: Sequence[str] | None = None
    model: nn.Module | None = None
    tokens: TokenWindows | None = None
    settings: GreedySettings | None = None


def target_projections(
    stats: CalibrationStats, target_modules: Sequence[str] | None
) -> tuple[str, ...]:
    """Choose the projections to plan.

    Args:
        stats: Calibration statistics.
        target_modules: Suffixes of dotted names such as "down_proj", or regular expressions that
            match whole names; `None` is every projection.

    Returns:
        Dotted names in the order of the statistics.

    Raises:
        UserError: A target matches nothing, or is not a regular expression.
    """
    names = tuple(stats.model.shapes)
    if target_modules is None:
        return names
    chosen: set[str] = set()
    for target in target_modules:
        matching = {name for name in names if _matches(name, target)}
        if not matching:
            raise UserError(
                f"No projection matches {target!r}. Known endings: "
                f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}."
            )
        chosen |= matching
    return tuple(name for name in names if name in chosen)


def plan_from_sparsities(
    stats: CalibrationStats,
    sparsities: Mapping[str, float],
    *,
    method: str,
    strategy: str,
    target_sparsity: float,
    points: Mapping[float, Mapping[str, float]] | None = None,
) -> SparsityPlan:
    """Make a plan whose rules reach the given sparsities.

    Args:
        stats: Calibration statistics, from which thresholds are taken.
        sparsities: Target sparsity by projection.
        method: Name of the method.
        strategy: Name of the strategy that chose `sparsities`.
        target_sparsity: Budget that was asked for.
        points: Sparsity by projection at other budgets, for the path of the plan.
    """
    # Projections that share an input share its statistics, and often the sparsity.
    rule = cache(method_named(method).rule)

    def planned(chosen: Mapping[str, float]) -> Planned:
        return {name: (value, rule(stats.of(name), value)) for name, value in chosen.items()}

    at_target, path = planned(sparsities), None
    if points:
        at_others = {budget: planned(chosen) for budget, chosen in points.items()}
        path = RulePath.from_points(at_others | {target_sparsity: at_target})
    return SparsityPlan(
        model=stats.model,
        projections={
            name: PlannedProjection(target_sparsity=target, rule=rule)
            for name, (target, rule) in at_target.items()
        },
        method=method,
        strategy=strategy,
        target_sparsity=target_sparsity,
        calibration=stats.text,
        dtype=stats.dtype,
        library_version=__version__,
        weight_format=stats.weight_format,
        path=path,
    )


def _matches(name: str, target: str) -> bool:
    try:
        return name == target or name.endswith(f".{target}") or bool(re.fullmatch(target, name))
    except re.error as error:
        raise UserError(f"{target!r} is not a regular expression: {error}.") from error
