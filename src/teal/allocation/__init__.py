"""How much sparsity each projection gets: the budget, and the strategies that distribute it."""

from teal.allocation.block_search import GreedySettings
from teal.allocation.budget import AllocationRequest
from teal.allocation.greedy import greedy_path
from teal.allocation.search import SearchStep, search_sparsity
from teal.allocation.strategies import (
    STRATEGIES,
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
