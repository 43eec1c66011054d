import json
from pathlib import Path

import pytest

from teal.foundation.errors import UserError
from teal.kernels.measured import Table, distance

TABLE = Table(file="triton_tiles.json", key="tiles", schema_version=3)


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    rows = [{"size": 3, "name": "a"}, {"size": 4, "name": "b"}]
    path = tmp_path / "table.json"
    path.write_text(TABLE.text(rows, "some GPU"))
    assert TABLE.read(path) == rows
    assert json.loads(path.read_text())["measured_on"] == "some GPU"


def test_a_table_of_a_newer_teal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema_version": 4, "tiles": []}))
    with pytest.raises(UserError, match="schema version 4, this teal reads up to 3"):
        TABLE.read(path)


def test_sizes_are_as_far_apart_as_they_are_times_as_large() -> None:
    assert distance((8, 8), (8, 8)) == 0.0
    assert distance((8, 2), (4, 4)) == distance((4, 4), (8, 2)) == distance((1, 1), (4, 1))
