import json
from importlib.resources import files
from pathlib import Path

import pytest

from teal.foundation.errors import UserError
from teal.kernels.triton.tile_config import (
    TileConfig,
    TunedConfig,
    config_for,
    read_table,
    table_text,
)
from teal.kernels.tuning import TRITON_FILE, Table, distance, tuning_folder

TABLE = Table(file=TRITON_FILE, package="teal.kernels.triton", key="sizes", schema_version=3)
CONFIG = TileConfig(block_n=16, block_k=512, warps=2, unroll=8)
ROW = TunedConfig(form="plain", in_features=4096, out_features=4096, config=CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return a folder with a table of one row."""
    (tmp_path / TRITON_FILE).write_text(table_text([ROW], "some GPU"))
    return str(tmp_path)


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    rows = [{"size": 3, "name": "a"}, {"size": 4, "name": "b"}]
    path = tmp_path / "table.json"
    path.write_text(TABLE.text(rows, "some GPU"))
    assert TABLE.read(path, dict) == rows
    assert json.loads(path.read_text())["measured_on"] == "some GPU"


def test_a_table_of_a_newer_teal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema_version": 4, "sizes": []}))
    with pytest.raises(UserError, match=r"schema version 4, this teal reads 3\. Update teal\."):
        TABLE.read(path, dict)


def test_a_table_of_an_older_teal_is_refused_with_its_cure(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema_version": 1, "tiles": []}))
    with pytest.raises(UserError, match=r"this teal reads 3\. Write it again with --tune\."):
        TABLE.read(path, dict)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 3}', '{"sizes": []}'])
def test_what_is_no_table_is_refused_with_its_cure(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table.json is no table of sizes. Write it again with --"):
        TABLE.read(path, dict)


def test_a_row_of_other_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(TABLE.text([{"tile": {"blocks": 1}}], "some GPU"))
    with pytest.raises(UserError, match="no table of sizes"):
        TABLE.read(path, TunedConfig.from_dict)


def test_rows_of_a_folder_come_before_those_of_the_package(folder: str) -> None:
    assert config_for("plain", 4096, 4096) != CONFIG
    assert config_for("plain", 4096, 4096, folder) == CONFIG
    assert config_for("plain", 14336, 4096, folder) == config_for("plain", 14336, 4096)


def test_a_row_of_a_folder_replaces_the_shipped_one_of_its_size(folder: str) -> None:
    shipped, rows = read_table(), read_table(folder)
    assert rows[0] == ROW
    assert len(rows) == len(shipped)


def test_a_folder_without_a_table_of_these_kernels_leaves_the_shipped_one(tmp_path: Path) -> None:
    assert read_table(str(tmp_path)) == read_table()


def test_a_device_has_its_own_shipped_table_or_the_default_one() -> None:
    default = files("teal.kernels.triton") / "tuned" / "nvidia-h200.json"
    for device in ("NVIDIA H200", "", "NVIDIA GeForce RTX 4090"):
        assert TABLE.shipped(device) == default


def test_the_table_of_the_device_at_hand_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tuned").mkdir()
    for name, rows in (("nvidia-h200", []), ("amd-instinct-mi300x", [{"size": 1}])):
        (tmp_path / "tuned" / f"{name}.json").write_text(TABLE.text(rows, name))
    monkeypatch.setattr("teal.kernels.tuning.files", lambda package: tmp_path)
    assert TABLE.rows("", "AMD Instinct MI300X", dict) == [{"size": 1}]
    assert TABLE.rows("", "NVIDIA H100", dict) == []


def test_a_tuning_folder_is_the_argument_of_the_kernels(folder: str) -> None:
    assert tuning_folder(None) == ""
    assert tuning_folder(Path(folder)) == tuning_folder(folder) == folder


def test_a_folder_without_a_table_is_refused_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match=r"holds no table. Make one with: teal bench decode"):
        tuning_folder(tmp_path)


def test_sizes_are_as_far_apart_as_they_are_times_as_large() -> None:
    assert distance((8, 8), (8, 8)) == 0.0
    assert distance((8, 2), (4, 4)) == distance((4, 4), (8, 2)) == distance((1, 1), (4, 1))
