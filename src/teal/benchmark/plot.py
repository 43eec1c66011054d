"""Plots time and speed against sparsity, with the limit that memory bandwidth sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teal.benchmark.decode import OURS, DecodeResult
from teal.benchmark.gemv import GemvResult
from teal.foundation.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 4.2, 3.4


def save_plot(results: Sequence[GemvResult], path: Path) -> None:
    """Plot one panel per product: dense, sparse and the limit.

    Args:
        results: Results of one or more products.
        path: Image file; its suffix gives the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    shapes = list(dict.fromkeys(result.shape for result in results))
    panels = _Panels(len(shapes))
    for axes, shape in zip(panels.axes, shapes, strict=True):
        rows = sorted((r for r in results if r.shape == shape), key=lambda row: row.sparsity)
        sparsity = [100 * row.sparsity for row in rows]
        axes.plot(sparsity, [row.dense.median for row in rows], "--", label="dense")
        axes.plot(sparsity, [row.sparse.median for row in rows], "o-", label="sparse")
        axes.plot(sparsity, [row.limit for row in rows], ":", label="limit of memory")
        axes.set(title=shape.name, xlabel="sparsity, %", ylabel="µs", ylim=(0, None))
    panels.save(path)


def save_decode_plot(results: Sequence[DecodeResult], path: Path) -> None:
    """Plot one panel per model: our tokens/s and the limit per format, and a line per baseline.

    Args:
        results: Results of one or more models.
        path: Image file; its suffix gives the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    models = list(dict.fromkeys(result.model for result in results))
    panels = _Panels(len(models))
    for axes, model in zip(panels.axes, models, strict=True):
        here = [row for row in results if row.model == model]
        ours = [row for row in here if row.runner == OURS]
        formats = list(dict.fromkeys(row.weights for row in ours))
        for index, weights in enumerate(formats):
            rows = [row for row in ours if row.weights == weights]
            _draw_lines(axes, rows, f"C{index}", has_label=index == 0)
        for index, baseline in enumerate(row for row in here if row.runner != OURS):
            color = f"C{index + len(formats)}"
            axes.axhline(
                baseline.tokens_per_second, linestyle="--", color=color, label=baseline.runner
            )
        axes.set(title=model, xlabel="effective sparsity, %", ylabel="tokens/s", ylim=(0, None))
    panels.save(path)


def _draw_lines(axes: "Axes", rows: Sequence[DecodeResult], color: str, *, has_label: bool) -> None:
    """Plot one weight format: our tokens/s, and the limit in the same colour."""
    rows = sorted(rows, key=lambda row: row.effective_sparsity)
    sparsity = [100 * row.effective_sparsity for row in rows]
    speeds, limits = [row.tokens_per_second for row in rows], [1e6 / row.limit for row in rows]
    axes.plot(sparsity, limits, ":", color=color, label="limit of memory" if has_label else None)
    axes.plot(sparsity, speeds, "o-", color=color, label=f"{OURS}, {rows[0].weights}")


class _Panels:
    """Axes side by side; the first shows the common legend.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """

    def __init__(self, number: int) -> None:
        try:
            # Not pyplot, which would keep global state.
            from matplotlib.figure import Figure  # noqa: PLC0415
        except ImportError:
            raise MissingExtraError("A plot", "matplotlib", "report") from None
        self._figure = Figure(figsize=(_WIDTH * number, _HEIGHT), layout="constrained")
        self.axes: list[Axes] = list(self._figure.subplots(1, number, squeeze=False)[0])

    def save(self, path: Path) -> None:
        self.axes[0].legend(fontsize="small")
        self._figure.savefig(path)
