"""Tile configurations of the Triton kernel of products, looked up in the tuning table."""

import functools
from dataclasses import asdict, dataclass
from typing import Any

from teal.foundation.errors import UserError
from teal.kernels.tuning import TRITON_FILE, Table, distance

TABLE = Table(file=TRITON_FILE, package="teal.kernels.triton", key="configs", schema_version=2)


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a product is split into programs.

    Attributes:
        block_n: Columns per program, a power of two.
        block_k: Channels per program, a power of two.
        warps: Warps per program, a power of two.
        unroll: Weight rows that a thread has in flight, for one row of activations.
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
    """A row of the tuning table.

    Attributes:
        form: "plain", "parts" or "gated".
        in_features: Channels of the weight it was measured on.
        out_features: Columns of that weight, all parts together.
        config: The fastest configuration there.
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


def read_table(folder: str = "", device: str = "") -> list[TunedConfig]:
    """Read the tuning table: the rows of a folder, then the shipped ones that it does not replace.

    Args:
        folder: Folder of tuning tables, "" for none.
        device: Name of the device that chooses the shipped table.

    Raises:
        UserError: A table cannot be read.
    """
    rows: dict[tuple[str, int, int], TunedConfig] = {}
    for row in TABLE.rows(folder, device, TunedConfig.from_dict):
        rows.setdefault((row.form, row.in_features, row.out_features), row)
    return list(rows.values())


def table_text(rows: list[TunedConfig], measured_on: str) -> str:
    """Return the JSON text of a table, one row a line.

    Args:
        rows: Its rows.
        measured_on: Name of the device.
    """
    return TABLE.text((row.to_dict() for row in rows), measured_on)


@functools.cache
def config_for(
    form: str, in_features: int, out_features: int, folder: str = "", device: str = ""
) -> TileConfig:
    """Return the configuration of the measured shape that is nearest, by ratio of sizes.

    Args:
        form: "plain", "parts" or "gated".
        in_features: Channels of the weight.
        out_features: Columns of the weight.
        folder: Folder of tuning tables, "" for none.
        device: Name of the device that chooses the shipped table.
    """
    size = in_features, out_features
    rows = (row for row in _table(folder, device) if row.form == form)
    # The first of several equally near rows counts.
    return min(rows, key=lambda row: distance((row.in_features, row.out_features), size)).config


@functools.cache
def _table(folder: str, device: str) -> list[TunedConfig]:
    return read_table(folder, device)
