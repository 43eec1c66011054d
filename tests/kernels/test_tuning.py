import json
from pathlib import Path

import pytest

from teal.foundation.errors import UserError
from teal.kernels import tuning as measured
from teal.kernels.triton import tile_config as triton_tile_config
from teal.kernels.triton.tile_config import TileConfig, TunedConfig, config_for, table_text
from teal.kernels.tuning import Table, distance, use_tables

TABLE = Table(file="triton_tile_configs.json", key="tiles", schema_version=3)


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    rows = [{"size": 3, "name": "a"}, {"size": 4, "name": "b"}]
    path = tmp_path / "table.json"
    path.write_text(TABLE.text(rows, "some GPU"))
    assert TABLE.read(path, dict) == rows
    assert json.loads(path.read_text())["measured_on"] == "some GPU"


def test_a_table_of_a_newer_teal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema_version": 4, "tiles": []}))
    with pytest.raises(UserError, match="schema version 4, this teal reads up to 3"):
        TABLE.read(path, dict)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1}', '{"tiles": []}'])
def test_what_is_no_table_is_refused_with_its_cure(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table.json is no table of tiles. Write it again with --"):
        TABLE.read(path, dict)


def test_a_row_of_other_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(TABLE.text([{"tile": {"blocks": 1}}], "some GPU"))
    with pytest.raises(UserError, match="no table of tiles"):
        TABLE.read(path, TunedConfig.from_dict)


def test_tables_of_a_folder_come_before_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_in_use", {})
    tile = TileConfig(block_n=16, block_k=512, warps=2, unroll=8)
    row = TunedConfig(form="plain", in_features=4096, out_features=4096, tile=tile)
    before, other = config_for("plain", 4096, 4096), config_for("plain", 14336, 4096)
    (tmp_path / triton_tile_config.TABLE.file).write_text(table_text([row], "some GPU"))
    use_tables(tmp_path)
    assert before != config_for("plain", 4096, 4096) == tile
    assert config_for("plain", 14336, 4096) == other
    assert (
        Table(file="cuda_tile_configs.json", key="configs", schema_version=2).path_in_use() is None
    )


def test_a_folder_without_a_table_is_refused_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match=r"holds no table. Make one with: teal bench decode"):
        use_tables(tmp_path)


def test_sizes_are_as_far_apart_as_they_are_times_as_large() -> None:
    assert distance((8, 8), (8, 8)) == 0.0
    assert distance((8, 2), (4, 4)) == distance((4, 4), (8, 2)) == distance((1, 1), (4, 1))
