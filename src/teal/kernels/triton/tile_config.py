"""Which config the GPU kernel uses for a shape: a small measured table, shipped as JSON."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teal.foundation.errors import UserError
from teal.kernels.tuning import Table, distance

TABLE = Table(file="triton_tile_configs.json", key="configs", schema_version=2)


@dataclass(frozen=True, kw_only=True)
class TileConfig:
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
                raise UserError(f"TileConfig has {name} {value!r}. Give a power of two.")


@dataclass(frozen=True, kw_only=True)
class TunedConfig:
    """One measured row of the table.

    Attributes:
        form: "plain", "parts" or "gated".
        in_features: K of the shape it was measured on.
        out_features: N of that shape, all parts together.
        config: The fastest config there.
    """

    form: str
    in_features: int
    out_features: int
    config: TileConfig

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TunedConfig":
        """Rebuild from `to_dict`."""
        return cls(**{**content, "config": TileConfig(**content["config"])})


def read_table(path: Path | None = None) -> list[TunedConfig]:
    """Read a table of tiles; by default the one shipped with the package.

    Raises:
        UserError: It is of a newer schema, or no table at all.
    """
    return TABLE.read(path, TunedConfig.from_dict)


def table_text(rows: list[TunedConfig], measured_on: str) -> str:
    """Return the JSON text of a table, one row a line.

    Args:
        rows: Its rows.
        measured_on: Name of the device.
    """
    return TABLE.text((row.to_dict() for row in rows), measured_on)


def config_for(form: str, in_features: int, out_features: int) -> TileConfig:
    """Return the config of the measured shape that is nearest, by ratio of sizes.

    Args:
        form: "plain", "parts" or "gated".
        in_features: Size of the input.
        out_features: Columns of the weight.
    """
    return _tile_for(form, (in_features, out_features), TABLE.path_in_use())


@functools.cache
def _tile_for(form: str, size: tuple[int, int], path: Path | None) -> TileConfig:
    rows = (row for row in _table(path) if row.form == form)
    return min(rows, key=lambda row: distance((row.in_features, row.out_features), size)).config


@functools.cache
def _table(path: Path | None) -> tuple[TunedConfig, ...]:
    # Of two as near, the first counts.
    return (*read_table(path), *read_table())
