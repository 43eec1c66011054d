"""The greedy search within one block (arXiv 2408.14690, section 4.2, algorithm 1)."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teal.allocation.block_error import BlockError
from teal.foundation.errors import UserError, check_sparsity
from teal.linear import SparseLinear
from teal.methods import MaskRule

logger = logging.getLogger(__name__)

# Thresholds beyond this quantile rest on too few activations.
_HIGHEST = 0.99

RuleOf = Callable[[str, float], MaskRule | None]


@dataclass(frozen=True, kw_only=True)
class GreedySettings:
    """Settings of the greedy search.

    Attributes:
        step: Sparsity that a block gains per round.
        until: Sparsity at which every path ends; a plan can ask for anything up to it.
        propagate: Sparsity of the blocks whose outputs feed the next block; `None` feeds dense
            outputs.
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


@dataclass(frozen=True)
class SearchRound:
    """The state of a block after one round.

    Attributes:
        sparsities: Sparsity by projection.
        error: Relative squared error of the block's output.
        attention: Output of the block's attention module for every batch.
    """

    sparsities: Mapping[str, float]
    error: float
    attention: list[Any]


class BlockSearch:
    """The greedy search within one block.

    Args:
        block_error: Measures the error of the block's output.
        linears: Sparse linears of the block by projection.
        in_attention: Whether each projection belongs to the attention module.
        sizes: Number of weights of each projection.
        rule_of: Returns the rule of a projection at a sparsity.
    """

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

    def rounds(self, settings: GreedySettings) -> Iterator[SearchRound]:
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
        state = SearchRound(dict.fromkeys(self._sizes, 0.0), 0.0, self._error.dense_attention)
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
        """Return the block's outputs that feed the next block, one per batch."""
        if settings.propagate is None:
            return self._error.dense_outputs
        reached = min(round(settings.propagate / settings.step), len(rounds) - 1)
        self._apply(rounds[reached])
        return self._error.run()[0]

    def _try(self, state: SearchRound, name: str, sparsity: float) -> SearchRound:
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
        return SearchRound({**state.sparsities, name: sparsity}, error, attention)

    def _apply(self, sparsities: Mapping[str, float]) -> None:
        for name, linear in self._linears.items():
            linear.rule = self._rule_of(name, sparsities[name])
