"""Writes what was found to be fastest into a table, beside what was measured before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teal.foundation.artifact import write_text
from teal.kernels.triton import tile_config as triton_tile_config
from teal.kernels.triton.tile_config import TunedConfig

if TYPE_CHECKING:
    from teal.kernels.cuda.tile_config import TileConfig
    from teal.kernels.cuda.tuned_configs import Task

try:
    from teal.kernels.cuda import tuned_configs
except ImportError:
    tuned_configs = None  # type: ignore[assignment]


def write_triton_table(folder: Path, rows: Sequence[TunedConfig], measured_on: str) -> Path:
    """Add rows to the table of tiles in a folder, or to the one in use where there is none.

    Args:
        folder: Where the table is written, under the name that the package's has.
        rows: What was found.
        measured_on: Name of the device.

    Returns:
        The file.
    """
    path = folder / triton_tile_config.TABLE.file
    known = triton_tile_config.read_table(str(folder), measured_on)
    sizes = {(row.form, row.in_features, row.out_features): row for row in (*known, *rows)}
    write_text(path, triton_tile_config.table_text(list(sizes.values()), measured_on))
    return path


def write_cuda_table(folder: Path, configs: "Mapping[Task, TileConfig]", measured_on: str) -> Path:
    """Add configs to the table in a folder, or to the one in use where there is none.

    Args:
        folder: Where the table is written, under the name that the package's has.
        configs: What was found.
        measured_on: Name of the device.

    Returns:
        The file.
    """
    path = folder / tuned_configs.TABLE.file
    known = tuned_configs.read_table(str(folder), measured_on)
    write_text(path, tuned_configs.table_text(known | dict(configs), measured_on))
    return path
