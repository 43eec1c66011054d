import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from teal.kernels.triton.gemv import groups
from teal.kernels.triton.gemv_kernel import sparse_gemv_kernel
from teal.kernels.triton.tile_config import read_table
from tests.pairwise import by_pairs

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="needs the tools in triton's wheel")

ROWS = sorted(read_table(), key=lambda row: (row.form, row.in_features))
ELEMENT_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Bytes. The CUDA C++ kernel computes these products of one row on such GPUs.
SPILLED = {("gated", 8192, 100, "fp16"): 8}


def _compile(row: Any, dtype: str, arch: int) -> Any:
    config = row.config
    flags = dict.fromkeys(
        ("HAS_SCORE_SCALE", "HAS_SHIFT", "HAS_BIAS", "HAS_RESIDUAL", "HAS_NORM"), False
    )
    constants = {
        "PARTS": 3 if row.form == "parts" else 1,
        "ACTIVATION": "silu" if row.form == "gated" else None,
        **flags,
        "ROWS": 1,
        "BLOCK_N": config.block_n,
        "GROUPS": groups(config, ELEMENT_SIZES[dtype]),
        "BLOCK_K": config.block_k,
        "UNROLL": config.unroll,
        "CHUNKS": triton.next_power_of_2(-(-row.in_features // config.block_k)),
        "EVEN": True,
    }
    special = {"score_scale_ptr": "*fp32", "shift_ptr": "*fp32", "partial_ptr": "*fp32"}
    special |= {"kept_ptr": "*i32", "arrived_ptr": "*i32", "eps": "fp32"}
    special |= {f"threshold_{part}": "fp32" for part in range(3)}
    signature, aligned = {}, {}
    for index, name in enumerate(sparse_gemv_kernel.arg_names):
        kind = special.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and kind != "fp32":
            aligned[(index,)] = [["tt.divisibility", 16]]
    places = {(sparse_gemv_kernel.arg_names.index(name),): v for name, v in constants.items()}
    source = ASTSource(sparse_gemv_kernel, signature, places, aligned)
    options = {"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [CUOBJDUMP, "--dump-resource-usage", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@by_pairs(row=ROWS, arch=[80, 90, 100], dtype=list(ELEMENT_SIZES))
def test_tiles_of_the_table_compile_to_wide_loads_without_spills(
    row: Any, arch: int, dtype: str, tmp_path: Path
) -> None:
    compiled = _compile(row, dtype, arch)
    resources = _resources(compiled.asm["cubin"], tmp_path)
    assert resources["LOCAL"] == 0
    assert resources["STACK"] == SPILLED.get((row.form, row.in_features, arch, dtype), 0)
    weight_rows = row.config.unroll * (2 if row.form == "gated" else 1)
    wide = re.findall(r"ld\.global\S*evict_first\S*\.v4\.b32", compiled.asm["ptx"])
    assert len(wide) == weight_rows
