"""How much sparsity where."""

from teal.allocation.greedy import GreedySettings, greedy_path
from teal.allocation.search import SearchStep, search_sparsity
from teal.allocation.strategies import (
    STRATEGIES,
    AllocationRequest,
    allocate,
    register_strategy,
    strategy_named,
)

__all__ = [
    "STRATEGIES",
    "AllocationRequest",
    "GreedySettings",
    "SearchStep",
    "allocate",
    "greedy_path",
    "register_strategy",
    "search_sparsity",
    "strategy_named",
]
