from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings")

from teal.benchmark.tuning.table import write_cuts, write_tiles
from teal.kernels.cuda import tuned_configs
from teal.kernels.triton import tile_config as triton_tile_config
from teal.kernels.triton.tile_config import Tile, TileRow


def test_cuts_are_added_to_those_that_were_measured_before(tmp_path: Path) -> None:
    known = tuned_configs.read_table()
    task, cut = next(iter(known.items()))
    other, faster = replace(task, in_features=task.in_features + 32), replace(cut, warps_k=2)
    write_cuts(tmp_path, {task: faster}, "some GPU")
    path = write_cuts(tmp_path, {other: cut}, "some GPU")
    assert path.name == "cuda_tile_configs.json"
    assert tuned_configs.read_table(path) == known | {task: faster, other: cut}


def test_tiles_are_added_to_those_that_were_measured_before(tmp_path: Path) -> None:
    known = triton_tile_config.read_table()
    tile = Tile(block_n=64, block_k=64, warps=1, unroll=4)
    faster, other = (
        replace(known[0], tile=tile),
        TileRow(form="plain", in_features=7, out_features=9, tile=tile),
    )
    write_tiles(tmp_path, [faster], "some GPU")
    path = write_tiles(tmp_path, [other], "some GPU")
    assert triton_tile_config.read_table(path) == [faster, *known[1:], other]
