"""Block-wise greedy allocation (arXiv 2408.14690, section 4.2, algorithm 1)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal.allocation.block_error import BlockError
from teal.allocation.budget import target_projections
from teal.calibration.allocation_path import AllocationPath
from teal.calibration.artifact import CalibrationStats
from teal.data import TokenWindows
from teal.foundation.errors import UserError, check_sparsity
from teal.foundation.progress import Progress, silent
from teal.linear import SparseLinear, TokenSelection
from teal.methods import MaskRule, method_named
from teal.models.blocks import first_batches
from teal.models.families import blocks_of, identity_of
from teal.models.weight_format import weight_format_of
from teal.sparsification import densify, insert_sparse_linears

logger = logging.getLogger(__name__)

# Thresholds beyond this quantile rest on too few activations.
_HIGHEST = 0.99

RuleOf = Callable[[str, float], MaskRule | None]


@dataclass(frozen=True, kw_only=True)
class GreedySettings:
    """How the greedy search runs.

    Attributes:
        step: Sparsity that a block norm weights in each round.
        until: Sparsity at which every block's path ends; plans may ask for anything up to it.
        propagate: Feed each block with the outputs that the blocks before it give at this
            sparsity; `None` feeds dense ones.
        batch_size: Windows per forward pass.
    """

    step: float = 0.005
    until: float = 0.7
    propagate: float | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_sparsity(self.until, "Greedy path end")
        if not 0.0 < self.step <= self.until:
            raise UserError(
                f"Greedy step {self.step!r} is outside (0, {self.until}]. Give 0.005, say."
            )
        if self.propagate is not None and not 0.0 <= self.propagate <= self.until:
            raise UserError(
                f"Propagated sparsity {self.propagate!r} is outside [0, {self.until}]. "
                "Choose one on the path."
            )


@torch.no_grad()
def greedy_path(
    model: nn.Module,
    stats: CalibrationStats,
    tokens: TokenWindows,
    *,
    method: str = "teal",
    target_modules: Sequence[str] | None = None,
    settings: GreedySettings | None = None,
    progress: Progress = silent,
) -> AllocationPath:
    """Raise the sparsity of each block step by step where it hurts the block's output least.

    All projections of a block start dense. Each round tries raising each of them by a step
    inversely proportional to its weight size, so that every trial drops the same number of
    weights, and keeps the trial with the least squared error, summed over tokens and channels, of
    the block's output against that of the dense block on the same input. Ties go to the first
    projection in the order of the forward pass.

    Args:
        model: The model that `stats` belong to; dense afterwards.
        stats: What the thresholds come from.
        tokens: Text to measure the error on.
        method: Name of the method that turns a sparsity into a rule.
        target_modules: Projections to raise, as in `allocate`.
        settings: Step size and the like.
        progress: Shows how far it is.

    Returns:
        The sparsity of every projection after every round.

    Raises:
        UserError: `stats` belong to another model, or to weights of another format.
    """
    settings = settings or GreedySettings()
    densify(model)
    stats.model.require(identity_of(model), "statistics")
    stats.require_format(weight_format_of(model))
    planned = target_projections(stats, target_modules)
    rule = method_named(method).rule
    batches = first_batches(model, tokens.tokens, batch_size=settings.batch_size)
    sparsities: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for index, block in enumerate(progress(blocks_of(model), "greedy")):
        names = [name for name in block.projections if name in planned]
        linears = insert_sparse_linears(model, dict.fromkeys(names), TokenSelection(0.0))
        try:
            search = _BlockSearch(
                BlockError(block, batches, index),
                linears,
                in_attention={name: block.in_attention(name) for name in names},
                sizes={name: stats.model.weight_size(name) for name in names},
                rule_of=lambda name, sparsity: rule(stats.of(name), sparsity),
            )
            # Only the numbers of each round are kept, not its attention outputs.
            rounds = [(state.sparsities, state.error) for state in search.rounds(settings)]
            columns = {name: [chosen[name] for chosen, _ in rounds] for name in names}
            sparsities |= {name: _column(values) for name, values in columns.items()}
            errors[block.name] = _column([error for _, error in rounds])
            outputs = search.outputs_at([chosen for chosen, _ in rounds], settings)
        finally:
            densify(model)
        for batch, output in zip(batches, outputs, strict=True):
            batch.hidden_states = output
    return AllocationPath(
        settings={**asdict(settings), **path_key(tokens, method, target_modules)},
        sparsities=sparsities,
        errors=errors,
    )


def path_key(
    tokens: TokenWindows, method: str, target_modules: Sequence[str] | None
) -> dict[str, Any]:
    """Return what, besides the settings, a path depends on, in JSON form."""
    return {
        "method": method,
        "target_modules": None if target_modules is None else list(target_modules),
        "text": tokens.provenance.to_dict(),
    }


def sparsities_at(path: AllocationPath, sparsity: float) -> dict[str, float]:
    """Read the sparsity of every projection off a path, every block at the same budget.

    Between two rounds the sparsities are interpolated, so that the budget is met exactly.

    Raises:
        UserError: The path ends below `sparsity`.
    """
    step = float(path.settings["step"])
    position = sparsity / step
    result: dict[str, float] = {}
    for name, column in path.sparsities.items():
        end = (len(column) - 1) * step
        if sparsity > end + 1e-9:
            raise UserError(
                f"The greedy path ends at sparsity {end:.3f}, {sparsity} was asked for. "
                "Ask for less, or run it anew with a smaller --greedy-step or a higher "
                "--greedy-until."
            )
        low = min(int(position), len(column) - 2)
        weight = position - low
        result[name] = float((1 - weight) * column[low] + weight * column[low + 1])
    return result


@dataclass(frozen=True)
class _Round:
    """The state of a block after one round.

    Attributes:
        sparsities: By projection.
        error: Relative squared error of the block's output.
        attention: Outputs of the block's attention module.
    """

    sparsities: Mapping[str, float]
    error: float
    attention: list[Any]


class _BlockSearch:
    """The greedy search within one block."""

    def __init__(
        self,
        block_error: BlockError,
        linears: Mapping[str, SparseLinear],
        *,
        in_attention: Mapping[str, bool],
        sizes: Mapping[str, int],
        rule_of: RuleOf,
    ) -> None:
        self._error = block_error
        self._linears = linears
        self._in_attention = in_attention
        self._sizes = sizes
        self._rule_of = rule_of

    def rounds(self, settings: GreedySettings) -> Iterator[_Round]:
        """Yield the dense state and the state after each round."""
        total = sum(self._sizes.values())
        steps = {name: settings.step * total / size for name, size in self._sizes.items()}
        stuck = [name for name, step in steps.items() if step > _HIGHEST]
        if stuck:
            logger.warning(
                "A greedy step of %s is too coarse for %s, which stay dense. Use a smaller step.",
                settings.step,
                ", ".join(stuck),
            )
        state = _Round(dict.fromkeys(self._sizes, 0.0), 0.0, self._error.dense_attention)
        yield state
        for _ in range(round(settings.until / settings.step)):
            trials = [
                self._try(state, name, state.sparsities[name] + step)
                for name, step in steps.items()
                if state.sparsities[name] + step <= _HIGHEST
            ]
            if not trials:
                return
            state = min(trials, key=lambda trial: trial.error)
            self._apply(state.sparsities)
            yield state

    def outputs_at(
        self, rounds: Sequence[Mapping[str, float]], settings: GreedySettings
    ) -> list[Tensor]:
        """Return the block's outputs that feed the next block."""
        if settings.propagate is None:
            return self._error.dense_outputs
        reached = min(round(settings.propagate / settings.step), len(rounds) - 1)
        self._apply(rounds[reached])
        return self._error.run()[0]

    def _try(self, state: _Round, name: str, sparsity: float) -> _Round:
        linear, before = self._linears[name], self._linears[name].rule
        linear.rule = self._rule_of(name, sparsity)
        try:
            if self._in_attention[name]:
                error, attention = self._error.measure()
            else:
                attention = state.attention
                error = self._error.measure_after(attention)
        finally:
            linear.rule = before
        return _Round({**state.sparsities, name: sparsity}, error, attention)

    def _apply(self, sparsities: Mapping[str, float]) -> None:
        for name, linear in self._linears.items():
            linear.rule = self._rule_of(name, sparsities[name])


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
