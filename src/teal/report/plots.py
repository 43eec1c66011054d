"""The plots of a report: quality against sparsity, and what a plan drops in each layer."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teal.calibration import CalibrationStats
from teal.calibration.histogram import Histogram
from teal.plan import SparsityPlan
from teal.report.canvas import (
    GREY,
    INK,
    MARKERS,
    PALE,
    PALETTE,
    new_figure,
    quieten,
    show_percent,
)
from teal.report.rows import DenseRow, SparseRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# With more layers a cell of the heat map is narrower than two digits.
_MOST_LAYERS_WITH_NUMBERS = 28
# Above this sparsity, white text is easier to read than black.
_WHITE_ABOVE = 0.65
# Beyond this multiple of the dense perplexity, a linear axis would flatten all other points.
_LOG_ABOVE = 10.0
# A histogram ends at this quantile of |x|: outliers are many times larger.
_SHOWN = 0.98
_HISTOGRAM_BINS = 64
_PANELS_PER_ROW = 4
_LAYER = re.compile(r"\.(\d+)\.")


def figures(
    dense: DenseRow, rows: Sequence[SparseRow], stats: CalibrationStats, plan: SparsityPlan
) -> "dict[str, Figure]":
    """Draw all plots of a report, by name.

    Args:
        dense: Result of the dense model.
        rows: Results of the plans.
        stats: Activations of the model; those of the first, middle and last layer are shown.
        plan: Plan whose sparsities and thresholds are shown.
    """
    layers = sorted({_layer_and_kind(name)[0] for name in stats.inputs})
    shown = {layers[0], layers[len(layers) // 2], layers[-1]}
    inputs = [name for name in stats.inputs if _layer_and_kind(name)[0] in shown]
    return {
        "perplexity-against-sparsity": perplexity_figure(dense, rows),
        "sparsity-by-layer-and-projection": sparsity_figure(plan),
        "activations-and-thresholds": histogram_figure(stats, plan, inputs),
    }


def perplexity_figure(dense: DenseRow, rows: Sequence[SparseRow]) -> "Figure":
    """Draw perplexity against effective sparsity, one line per strategy, starting at dense.

    Error bars, and the band around dense, show one standard error to either side.

    Args:
        dense: Result of the dense model, a horizontal line.
        rows: Results of the plans, in any order.
    """
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    by_strategy: dict[str, list[SparseRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.effective_sparsity):
        by_strategy[row.strategy].append(row)
    for index, (strategy, line) in enumerate(by_strategy.items()):
        axes.errorbar(
            [0.0, *(row.effective_sparsity for row in line)],
            [dense.perplexity, *(row.perplexity for row in line)],
            yerr=[math.nan, *(_or_nan(row.perplexity_error) for row in line)],
            label=strategy,
            color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=slice(1, None),
            linewidth=1.8,
            capsize=3,
        )
    axes.axhline(dense.perplexity, color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), label="dense")
    if dense.perplexity_error is not None:
        low, high = (dense.perplexity + sign * dense.perplexity_error for sign in (-1, 1))
        axes.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0)
    if max((row.perplexity for row in rows), default=0.0) > _LOG_ABOVE * dense.perplexity:
        axes.set_yscale("log")
    axes.set_xlim(left=0.0)
    axes.set_xlabel("effective sparsity")
    axes.set_ylabel("perplexity")
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.legend(loc="upper left", framealpha=1.0, edgecolor="none", labelcolor=INK)
    show_percent(axes.xaxis)
    quieten(axes)
    return figure


def sparsity_figure(plan: SparsityPlan) -> "Figure":
    """Draw the target sparsity of every projection: a column per layer, a row per kind.

    Numbers are percentages. Projections that the plan leaves out are grey.

    Args:
        plan: A plan for any family and any number of layers.
    """
    places = {name: _layer_and_kind(name) for name in plan.model.shapes}
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(kinds), len(layers)), math.nan)
    for name, planned in plan.projections.items():
        layer, kind = places[name]
        grid[kinds.index(kind), layers.index(layer)] = planned.target_sparsity

    figure = new_figure(1.2 + 0.38 * len(kinds))
    axes = figure.add_subplot(facecolor=PALE)
    image = axes.imshow(grid, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    has_room = len(layers) <= _MOST_LAYERS_WITH_NUMBERS
    if has_room:
        _write_numbers(axes, grid)
    step = 1 if has_room else 5
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds])
    axes.set_xlabel("layer")
    axes.set_title(f"target sparsity of the {_describe(plan)}", loc="left", fontsize=10, color=INK)
    quieten(axes, *axes.spines)
    bar = figure.colorbar(image, pad=0.015, aspect=18)
    show_percent(bar.ax.yaxis)
    quieten(bar.ax, "outline")
    return figure


def histogram_figure(
    stats: CalibrationStats, plan: SparsityPlan, inputs: Sequence[str]
) -> "Figure":
    """Draw the distribution of |x|, with the thresholds of the projections that read x.

    The axis is linear and ends at the 98 % quantile, so that areas are fractions of the
    activations: the darker part, left of a line, is dropped. Rules with a score scale or a shift
    have no line, because their thresholds are not values of |x|.

    Args:
        stats: Activations of the model.
        plan: A plan for the same model.
        inputs: Names of inputs in `stats`; one panel each.
    """
    columns = min(_PANELS_PER_ROW, len(inputs))
    rows = math.ceil(len(inputs) / columns)
    figure = new_figure(0.5 + 1.75 * rows)
    title = f"|x| and what the {_describe(plan)} drops of it, left of the lines"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    for index, name in enumerate(inputs):
        axes = figure.add_subplot(rows, columns, index + 1)
        layer, kind = _layer_and_kind(name)
        axes.set_title(f"layer {layer} · {kind}", loc="left", fontsize=9, color=INK)
        _draw_panel(axes, stats.inputs[name].histogram, list(_thresholds(stats, plan, name)))
    return figure


class _Threshold(NamedTuple):
    value: float
    label: str
    color: str


def _thresholds(stats: CalibrationStats, plan: SparsityPlan, name: str) -> Iterator[_Threshold]:
    """Yield the distinct thresholds on one input, each in the colour of its first projection."""
    projections = stats.inputs[name].projections
    readers: dict[float, list[str]] = defaultdict(list)
    for projection in projections:
        planned = plan.projections.get(projection)
        if planned and planned.rule and not planned.rule.vectors:
            readers[planned.rule.threshold].append(projection)
    for value, names in readers.items():
        kinds = ", ".join(name.rpartition(".")[2].removesuffix("_proj") for name in names)
        sparsity = plan.projections[names[0]].target_sparsity
        color = PALETTE[(1 + projections.index(names[0])) % len(PALETTE)]
        yield _Threshold(value, f"{kinds} {100 * sparsity:.0f} %", color)


def _draw_panel(axes: "Axes", histogram: Histogram, thresholds: Sequence[_Threshold]) -> None:
    values = [threshold.value for threshold in thresholds]
    limit = max([histogram.quantile(_SHOWN), *(1.05 * value for value in values)]) or 1.0
    # Thresholds are edges too, so that the dropped area is exact.
    edges = np.unique([*np.linspace(0.0, limit, _HISTOGRAM_BINS + 1), *values])
    density = np.diff(_shares_below(histogram, edges)) / np.diff(edges)
    for end in [*values, limit]:
        dropped = edges[1:] <= end
        axes.fill_between(
            edges[: dropped.sum() + 1],
            np.append(density[dropped], 0.0),
            step="post",
            color=PALETTE[0],
            alpha=0.25,
            linewidth=0,
        )
    for value, label, color in thresholds:
        axes.axvline(value, color=color, linewidth=1.6, label=label)
    if thresholds:
        axes.legend(frameon=False, loc="upper right", fontsize=8, handlelength=0.9, labelcolor=INK)
    axes.set_xlim(0.0, limit)
    axes.set_ylim(bottom=0.0)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    quieten(axes, "left")


def _shares_below(histogram: Histogram, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the fraction of |x| below each value, interpolated between bins that are not empty.

    A dtype such as bfloat16 leaves most bins empty; counting whole bins would draw a comb.
    """
    counts: NDArray[np.float64] = histogram.counts.numpy()
    held = counts > 0
    ends = np.concatenate([[0.0], histogram.edges.numpy()[1:][held]])
    shares = np.concatenate([[0.0], counts[held].cumsum() / counts.sum()])
    return np.asarray(np.interp(values, ends, shares))


def _write_numbers(axes: "Axes", grid: NDArray[np.float64]) -> None:
    for (row, column), sparsity in np.ndenumerate(grid):
        if not math.isnan(sparsity):
            color = "white" if sparsity > _WHITE_ABOVE else INK
            text = f"{100 * sparsity:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)


def _describe(plan: SparsityPlan) -> str:
    return f"{plan.strategy} plan at {100 * plan.target_sparsity:.0f} %"


def _layer_and_kind(name: str) -> tuple[int, str]:
    """Split "model.layers.3.mlp.up_proj" into 3 and "mlp.up_proj"."""
    _, layer, kind = _LAYER.split(name, maxsplit=1)
    return int(layer), kind


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
