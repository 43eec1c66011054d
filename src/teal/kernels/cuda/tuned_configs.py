"""Tuning table of the CUDA kernels: the fastest measured way to divide a product into blocks."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from teal.kernels.cuda.tile_config import TileConfig
from teal.kernels.tuning import CUDA_FILE, Table, distance

TABLE = Table(file=CUDA_FILE, package="teal.kernels.cuda", key="configs", schema_version=3)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Key of the table: what the fastest configuration depends on.

    Attributes:
        kernel: "product" on its own (gemv.cu), or "step" for one of a decode step (decode_step.cu).
        form: "plain" or "gated" for a product on its own; in a step what its input is made from:
            "hidden", "attention" or "gated".
        bits: Bits per weight.
        is_dense: Nothing is dropped; always false for products on their own, which have one
            configuration for both.
        in_features: Channels.
        out_features: Columns of all parts.
        rows: Rows of activations that are multiplied at once.
    """

    kernel: Literal["product", "step"]
    form: str
    bits: int
    is_dense: bool
    in_features: int
    out_features: int
    rows: int = 1


def read_table(folder: str = "", device: str = "") -> dict[Task, TileConfig]:
    """Read the tuning table: the rows of a folder, then the shipped ones that it does not replace.

    Args:
        folder: Folder of tuning tables, "" for none.
        device: Name of the device that chooses the shipped table.

    Raises:
        UserError: A table cannot be read.
    """
    configs: dict[Task, TileConfig] = {}
    for task, config in TABLE.rows(folder, device, from_row):
        configs.setdefault(task, config)
    return configs


def table_text(configs: Mapping[Task, TileConfig], measured_on: str) -> str:
    """Return the JSON text of a table, one row a line.

    Args:
        configs: The fastest configuration of each task.
        measured_on: Name of the device.
    """
    rows = ({**asdict(task), "config": asdict(config)} for task, config in configs.items())
    return TABLE.text(rows, measured_on)


def from_row(row: dict[str, Any]) -> tuple[Task, TileConfig]:
    """Return a row of the table from its JSON form."""
    task = {name: value for name, value in row.items() if name != "config"}
    return Task(**task), TileConfig(**row["config"])


def tuned_config(task: Task, tuning: str = "", device: str = "") -> TileConfig:
    """Return the configuration of the nearest task in the table.

    It was measured for another size: the caller adapts it.

    Args:
        task: What is looked up.
        tuning: Folder of tuning tables, "" for those of the package.
        device: Name of the device that chooses the shipped table.
    """
    return _table(tuning, device)[nearest(task, tuning, device)]


@functools.cache
def nearest(task: Task, tuning: str = "", device: str = "") -> Task:
    """Return the nearest task in the table, by the ratio of sizes.

    It has at least as many rows, the fewest in the table; if none has, it has one row.

    Args:
        task: What is looked up.
        tuning: Folder of tuning tables, "" for those of the package.
        device: Name of the device that chooses the shipped table.
    """
    alike = [other for other in _table(tuning, device) if _kind(other) == _kind(task)]
    rows = min((other.rows for other in alike if other.rows >= task.rows), default=1)
    with_rows = (other for other in alike if other.rows == rows)
    return min(with_rows, key=lambda other: distance(_size(other), _size(task)))


@functools.cache
def _table(tuning: str, device: str) -> Mapping[Task, TileConfig]:
    return read_table(tuning, device)


def _kind(task: Task) -> tuple[object, ...]:
    return task.kernel, task.form, task.bits, task.is_dense


def _size(task: Task) -> tuple[int, int]:
    return task.in_features, task.out_features
