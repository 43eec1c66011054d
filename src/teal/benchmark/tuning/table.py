"""Writes the fastest configurations into a tuning table, beside those measured before."""

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
    """Add rows to the Triton table in a folder, which then also holds the shipped rows.

    Args:
        folder: Destination.
        rows: Rows to add; they replace those of the same sizes.
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
    """Add configurations to the CUDA table in a folder, which then also holds the shipped rows.

    Args:
        folder: Destination.
        configs: Configurations to add; they replace those of the same task.
        measured_on: Name of the device.

    Returns:
        The file.
    """
    path = folder / tuned_configs.TABLE.file
    known = tuned_configs.read_table(str(folder), measured_on)
    write_text(path, tuned_configs.table_text(known | dict(configs), measured_on))
    return path
