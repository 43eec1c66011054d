"""Writes what was found to be fastest into a table, beside what was measured before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teal.foundation.artifact import write_text
from teal.kernels import triton_tiles
from teal.kernels.triton_tiles import TileRow

if TYPE_CHECKING:
    from teal.kernels.cuda_cuts import Task
    from teal.kernels.cuda_strips import Cut

try:
    from teal.kernels import cuda_cuts
except ImportError:
    cuda_cuts = None  # type: ignore[assignment]


def write_tiles(folder: Path, rows: Sequence[TileRow], measured_on: str) -> Path:
    """Add rows to the table of tiles in a folder, or to the one in use where there is none.

    Args:
        folder: Where the table is written, under the name that the package's has.
        rows: What was found.
        measured_on: Name of the device.

    Returns:
        The file.
    """
    path = folder / triton_tiles.TABLE.file
    known = triton_tiles.read_table(path if path.exists() else triton_tiles.TABLE.path_in_use())
    sizes = {(row.form, row.in_features, row.out_features): row for row in (*known, *rows)}
    write_text(path, triton_tiles.table_text(list(sizes.values()), measured_on))
    return path


def write_cuts(folder: Path, cuts: "Mapping[Task, Cut]", measured_on: str) -> Path:
    """Add cuts to the table in a folder, or to the one in use where there is none.

    Args:
        folder: Where the table is written, under the name that the package's has.
        cuts: What was found.
        measured_on: Name of the device.

    Returns:
        The file.
    """
    path = folder / cuda_cuts.TABLE.file
    known = cuda_cuts.read_table(path if path.exists() else cuda_cuts.TABLE.path_in_use())
    write_text(path, cuda_cuts.table_text(known | dict(cuts), measured_on))
    return path
