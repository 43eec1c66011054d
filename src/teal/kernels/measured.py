"""Tables of what was measured to be fastest: JSON of the package, looked up by the nearest size."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from teal.foundation.errors import UserError


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

    def read(self, path: Path | None = None) -> list[dict[str, Any]]:
        """Return the rows of a table; by default of the one that the package ships.

        Args:
            path: Of another.

        Raises:
            UserError: It is of a newer schema.
        """
        source = files("teal.kernels") / self.file if path is None else path
        content = json.loads(source.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version > self.schema_version:
            raise UserError(
                f"{path or self.file} has schema version {version}, this teal reads up to "
                f"{self.schema_version}. Update teal."
            )
        rows: list[dict[str, Any]] = content[self.key]
        return rows

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
