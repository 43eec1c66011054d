"""Which tile the GPU kernel uses for a shape: a small measured table, shipped as JSON."""

import functools
import json
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from teal.foundation.errors import UserError

TABLE = "triton_tiles.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a product is cut into programs.

    Attributes:
        block_n: Columns per program, a power of two.
        block_k: Channels per program, a power of two.
        warps: Warps per program, a power of two.
        unroll: Strips that a thread has in flight, for one row.
    """

    block_n: int
    block_k: int
    warps: int
    unroll: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise UserError(f"Tile has {name} {value!r}. Give a power of two.")


@dataclass(frozen=True, kw_only=True)
class TileRow:
    """One measured row of the table.

    Attributes:
        form: "plain", "parts" or "gated".
        in_features: K of the shape it was measured on.
        out_features: N of that shape, all parts together.
        tile: The fastest tile there.
    """

    form: str
    in_features: int
    out_features: int
    tile: Tile

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TileRow":
        """Rebuild from `to_dict`."""
        return cls(**{**content, "tile": Tile(**content["tile"])})


def read_table(path: Path | None = None) -> list[TileRow]:
    """Read a table of tiles; by default the one shipped with the package.

    Raises:
        UserError: It is of a newer schema.
    """
    source = files("teal.kernels") / TABLE if path is None else path
    content = json.loads(source.read_text(encoding="utf-8"))
    if content["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"The tile table has schema version {content['schema_version']}, this teal reads up "
            f"to {SCHEMA_VERSION}. Update teal."
        )
    return [TileRow.from_dict(row) for row in content["tiles"]]


def table_text(rows: list[TileRow], measured_on: str) -> str:
    """Return the JSON text of a table, one row a line.

    Args:
        rows: Its rows.
        measured_on: Name of the device.
    """
    lines = ",\n".join(f"    {json.dumps(row.to_dict())}" for row in rows)
    head = f'  "schema_version": {SCHEMA_VERSION},\n  "measured_on": {json.dumps(measured_on)},'
    return f'{{\n{head}\n  "tiles": [\n{lines}\n  ]\n}}\n'


@functools.cache
def tile_for(form: str, in_features: int, out_features: int) -> Tile:
    """Return the tile of the measured shape that is nearest, by ratio of sizes.

    Args:
        form: "plain", "parts" or "gated".
        in_features: Size of the input.
        out_features: Columns of the weight.
    """

    def distance(row: TileRow) -> float:
        ratios = (row.in_features / in_features, row.out_features / out_features)
        return sum(abs(math.log(ratio)) for ratio in ratios)

    return min((row for row in _shipped() if row.form == form), key=distance).tile


@functools.cache
def _shipped() -> tuple[TileRow, ...]:
    return tuple(read_table())
