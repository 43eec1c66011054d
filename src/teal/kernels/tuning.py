"""Tuning tables: the launch configurations measured to be fastest, looked up by the nearest size.

The package ships a table per device in the folder `tuned` beside the kernels. A folder written by
`--tune` holds tables of any kernels; where one is given, its rows come before the shipped ones.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import torch

from teal.foundation.errors import UserError

Row = TypeVar("Row")

# Names of the tables in a folder written by `--tune`.
CUDA_FILE = "cuda_tile_configs.json"
TRITON_FILE = "triton_tile_configs.json"

# Its table serves all devices that have none.
_DEFAULT_DEVICE = "NVIDIA H200"


def tuning_folder(folder: str | Path | None) -> str:
    """Return the `tuning` argument of the kernels for a folder, "" for `None`.

    Other configurations add in another order, so results may differ in their last bits from those
    with the shipped tables.

    Args:
        folder: Written by `teal bench gemv --tune` or `teal bench decode --tune`.

    Raises:
        UserError: The folder holds no table.
    """
    if folder is None:
        return ""
    if not any((Path(folder) / name).is_file() for name in (CUDA_FILE, TRITON_FILE)):
        raise UserError(
            f"{str(folder)!r} holds no table. Make one with: teal bench decode --config NAME "
            f"--tune {folder}"
        )
    return str(folder)


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name by which tables are looked up, "" for devices that are not GPUs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A kind of tuning table.

    Attributes:
        file: Name in a folder written by `--tune`.
        package: Package whose folder `tuned` holds the shipped tables, one per device.
        key: Name of the list of rows in the JSON.
        schema_version: The only version that is read and written.
    """

    file: str
    package: str
    key: str
    schema_version: int

    def rows(
        self, folder: str, device: str, from_row: Callable[[dict[str, Any]], Row]
    ) -> list[Row]:
        """Return the rows of the table in a folder, if it has one, then those of the shipped table.

        Args:
            folder: Folder of tuning tables, "" for none.
            device: Name of the device that chooses the shipped table.
            from_row: Makes a row from its JSON form.

        Raises:
            UserError: A table cannot be read.
        """
        path = Path(folder) / self.file
        own = self.read(path, from_row) if folder and path.is_file() else []
        return own + self.read(self.shipped(device), from_row)

    def shipped(self, device: str) -> Traversable:
        """Return the shipped table of a device, or the default one where it has none."""
        folder = files(self.package) / "tuned"
        table = folder / f"{_slug(device)}.json"
        return table if table.is_file() else folder / f"{_slug(_DEFAULT_DEVICE)}.json"

    def read(self, path: Traversable, from_row: Callable[[dict[str, Any]], Row]) -> list[Row]:
        """Return the rows of one file.

        Args:
            path: The file.
            from_row: Makes a row from its JSON form.

        Raises:
            UserError: The file is no table, or has another schema version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["schema_version"]
            if version == self.schema_version:
                return list(map(from_row, content[self.key]))
            is_newer = version > self.schema_version
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is no table of {self.key}. Write it again with --tune."
            ) from None
        cure = "Update teal." if is_newer else "Write it again with --tune."
        raise UserError(
            f"{path} has schema version {version}, this teal reads {self.schema_version}. {cure}"
        )

    def text(self, rows: Iterable[dict[str, Any]], measured_on: str) -> str:
        """Return the JSON text of a table, one row a line.

        Args:
            rows: Its rows.
            measured_on: Name of the device.
        """
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        version = f'  "schema_version": {self.schema_version},'
        device = f'  "measured_on": {json.dumps(measured_on)},'
        return f'{{\n{version}\n{device}\n  "{self.key}": [\n{lines}\n  ]\n}}\n'


def distance(sizes: Sequence[int], others: Sequence[int]) -> float:
    """Return how far sizes are from others: the sum of |log(size / other)|."""
    return sum(abs(math.log(size / other)) for size, other in zip(sizes, others, strict=True))


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
