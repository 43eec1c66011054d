"""How the CUDA kernels config products into blocks: a small measured table, shipped as JSON."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from teal.kernels.cuda.tile_config import TileConfig
from teal.kernels.tuning import CUDA_FILE, Table, distance

TABLE = Table(file=CUDA_FILE, package="teal.kernels.cuda", key="configs", schema_version=3)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a config depends on.

    Attributes:
        kernel: A product on its own (gemv.cu), or one of a fused decode step (decode_step.cu).
        form: Of a product "plain" or "gated"; in a step what its input is made from: "hidden",
            "attention" or "gated".
        bits: Of a weight or code.
        is_dense: Nothing is dropped; false for products on their own, which are config one way.
        in_features: Channels.
        out_features: Columns of all parts.
        rows: Of activations, multiplied at once.
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
    for task, config in TABLE.rows(folder, device, _from_row):
        configs.setdefault(task, config)
    return configs


def table_text(configs: Mapping[Task, TileConfig], measured_on: str) -> str:
    """Return the JSON text of a table, one row a line.

    Args:
        configs: The fastest of each task.
        measured_on: Name of the device.
    """
    rows = ({**asdict(task), "config": asdict(config)} for task, config in configs.items())
    return TABLE.text(rows, measured_on)


def tuned_config(task: Task) -> TileConfig:
    """Return the config of the measured task that is nearest.

    It is that of another size: the caller sees to it that it fits.
    """
    return _table()[nearest(task)]


def nearest(task: Task) -> Task:
    """Return the measured task that is nearest, by ratio of sizes.

    It has as many rows or more, the fewest that were measured; if none has, it is of one row.
    """
    return _nearest(task)


@functools.cache
def _nearest(task: Task) -> Task:
    alike = [other for other in _table() if _kind(other) == _kind(task)]
    rows = min((other.rows for other in alike if other.rows >= task.rows), default=1)
    of_rows = (other for other in alike if other.rows == rows)
    return min(of_rows, key=lambda other: distance(_size(other), _size(task)))


@functools.cache
def _table() -> Mapping[Task, TileConfig]:
    return read_table()


def _kind(task: Task) -> tuple[object, ...]:
    return task.kernel, task.form, task.bits, task.is_dense


def _size(task: Task) -> tuple[int, int]:
    return task.in_features, task.out_features


def _from_row(row: dict[str, Any]) -> tuple[Task, TileConfig]:
    task = {name: value for name, value in row.items() if name != "config"}
    return Task(**task), TileConfig(**row["config"])
