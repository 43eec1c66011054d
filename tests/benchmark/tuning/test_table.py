from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings")

from teal.benchmark.tuning.table import write_cuda_table, write_triton_table
from teal.kernels.cuda import tuned_configs
from teal.kernels.triton import tile_config as triton_tile_config
from teal.kernels.triton.tile_config import TileConfig, TunedConfig


def test_cuda_configurations_are_added_to_known_ones(tmp_path: Path) -> None:
    known = tuned_configs.read_table()
    task, config = next(iter(known.items()))
    other, faster = replace(task, in_features=task.in_features + 32), replace(config, warps_k=2)
    write_cuda_table(tmp_path, {task: faster}, "some GPU")
    path = write_cuda_table(tmp_path, {other: config}, "some GPU")
    assert path.name == "cuda_tile_configs.json"
    assert tuned_configs.read_table(str(tmp_path)) == known | {task: faster, other: config}


def test_triton_configurations_are_added_to_known_ones(tmp_path: Path) -> None:
    known = triton_tile_config.read_table()
    config = TileConfig(block_n=64, block_k=64, warps=1, unroll=4)
    faster = replace(known[0], config=config)
    other = TunedConfig(form="plain", in_features=7, out_features=9, config=config)
    write_triton_table(tmp_path, [faster], "some GPU")
    write_triton_table(tmp_path, [other], "some GPU")
    assert triton_tile_config.read_table(str(tmp_path)) == [faster, *known[1:], other]
