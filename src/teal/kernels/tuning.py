"""Tables of what was measured to be fastest: JSON, looked up by the nearest size.

The package ships its own; `use_tables` puts others before them.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from teal.foundation.errors import UserError

Row = TypeVar("Row")

# Where the package's own are.
_SHIPPED = {
    "cuda_tile_configs.json": "teal.kernels.cuda",
    "triton_tile_configs.json": "teal.kernels.triton",
}
# By name of the file, those that come before the package's.
_in_use: dict[str, Path] = {}


def use_tables(folder: Path | str) -> None:
    """TileConfig products as the tables in a folder say, in this process and from now on.

    Sizes that were multiplied before keep their configs, so call it first. Other configs add in
    another order, so that results may differ in their last bits. Where the tables lack a size, the
    nearest counts, of theirs and the package's.

    Args:
        folder: What `teal bench gemv --tune` or `teal bench decode --tune` wrote.

    Raises:
        UserError: It holds no table.
    """
    found = {name: path for name in _SHIPPED if (path := Path(folder) / name).is_file()}
    if not found:
        raise UserError(
            f"{str(folder)!r} holds no table. Make one with: teal bench decode --config NAME "
            f"--tune {folder}"
        )
    _in_use.clear()
    _in_use.update(found)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A kind of table.

    Attributes:
        file: Name of the one that the package ships, in `teal.kernels`.
        key: What its rows are called in the JSON.
        schema_version: Of the newest that can be read, and of what is written.
    """

    file: str
    key: str
    schema_version: int

    def path_in_use(self) -> Path | None:
        """Return where the table in use is; `None` is in the package."""
        return _in_use.get(self.file)

    def read(self, path: Path | None, from_row: Callable[[dict[str, Any]], Row]) -> list[Row]:
        """Return the rows of a table.

        Args:
            path: Where it is; `None` is in the package.
            from_row: Makes a row from its JSON form.

        Raises:
            UserError: It is of a newer schema, or no table at all.
        """
        source = files(_SHIPPED[self.file]) / self.file if path is None else path
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
            version, rows = content["schema_version"], content[self.key]
            if version <= self.schema_version:
                return list(map(from_row, rows))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is no table of {self.key}. Write it again with --tune."
            ) from None
        raise UserError(
            f"{path or self.file} has schema version {version}, this teal reads up to "
            f"{self.schema_version}. Update teal."
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
    """Return how far sizes are from others: how many times as large, added up as logarithms."""
    return sum(abs(math.log(size / other)) for size, other in zip(sizes, others, strict=True))
