"""Block-wise greedy allocation (arXiv 2408.14690, section 4.2, algorithm 1)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from teal.allocation.block_error import BlockError
from teal.allocation.block_search import BlockSearch, GreedySettings
from teal.allocation.budget import AllocationRequest, target_projections
from teal.calibration.allocation_path import AllocationPath
from teal.calibration.artifact import CalibrationStats
from teal.data import TokenWindows
from teal.foundation.errors import UserError
from teal.foundation.progress import Progress, silent
from teal.linear import TokenSelection
from teal.methods import method_named
from teal.models.blocks import first_batches
from teal.models.families import blocks_of, identity_of
from teal.models.weight_format import weight_format_of
from teal.sparsification import densify, insert_sparse_linears


def greedy_sparsities(request: AllocationRequest) -> dict[str, float]:
    """Read the sparsity of every projection off the greedy path, searching for it if needed."""
    return sparsities_at(_path_for(request), request.sparsity)


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

    All projections of a block start dense. Each round tries every projection with its sparsity
    raised by a step inversely proportional to its weight size, so every trial drops the same
    number of weights. It keeps the trial with the least squared error of the block's output
    against the dense block on the same input, summed over tokens and channels. Ties go to the
    first projection in the order of the forward pass.

    Args:
        model: The model that `stats` belong to; dense afterwards.
        stats: Calibration statistics, from which thresholds are taken.
        tokens: Text to measure the error on.
        method: Name of the method that turns a sparsity into a rule.
        target_modules: Projections to make sparse, as in `allocate`.
        settings: Settings of the search; `None` takes the defaults.
        progress: Shows the blocks while they are searched.

    Returns:
        The sparsity of every projection after every round.

    Raises:
        UserError: `stats` belong to another model, or to another weight format.
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
            search = BlockSearch(
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
    """Return, in JSON form, what a path depends on besides its settings."""
    return {
        "method": method,
        "target_modules": None if target_modules is None else list(target_modules),
        "text": tokens.provenance.to_dict(),
    }


def sparsities_at(path: AllocationPath, sparsity: float) -> dict[str, float]:
    """Return the sparsity of every projection at a budget, which each block meets on its own.

    Between two rounds the sparsities are interpolated, so the budget is met exactly.

    Args:
        path: The path of a greedy search.
        sparsity: Budget in [0, 1).

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


def _path_for(request: AllocationRequest) -> AllocationPath:
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


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
