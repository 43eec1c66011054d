"""Draws time against sparsity, with the limit line of memory."""

from collections.abc import Sequence
from pathlib import Path

from teal.benchmark.gemv import GemvResult
from teal.foundation.errors import MissingExtraError

_WIDTH, _HEIGHT = 4.2, 3.4


def save_plot(results: Sequence[GemvResult], path: Path) -> None:
    """Draw one panel per product: dense, sparse and the limit.

    Args:
        results: Of one or more products.
        path: Image file; its suffix is the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        # Not pyplot, which would change the process's display.
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise MissingExtraError("A plot", "matplotlib", "report") from None
    shapes = list(dict.fromkeys(result.shape for result in results))
    figure = Figure(figsize=(_WIDTH * len(shapes), _HEIGHT), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        rows = sorted((r for r in results if r.shape == shape), key=lambda row: row.sparsity)
        sparsity = [100 * row.sparsity for row in rows]
        axes.plot(sparsity, [row.dense.median for row in rows], "--", label="dense")
        axes.plot(sparsity, [row.sparse.median for row in rows], "o-", label="sparse")
        axes.plot(sparsity, [row.limit for row in rows], ":", label="limit of memory")
        axes.set(title=shape.name, xlabel="sparsity, %", ylabel="µs", ylim=(0, None))
    figure.axes[0].legend()
    figure.savefig(path)
