"""Inspects compiled kernels with NVIDIA's tools."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from teal.kernels.cuda.tile_config import TileConfig, bits_of


def dumped(cubin: Path, option: str) -> str:
    """Return the output of cuobjdump for a compiled kernel."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the tools in triton's wheel")
    command = [cuobjdump, option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_no_spills(cubin: Path) -> None:
    used = dumped(cubin, "--dump-resource-usage")
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", used)) == {"0"}


def assert_weight_rows_load_whole(
    cubin: Path, config: TileConfig, dtype: torch.dtype, rows: int = 1
) -> None:
    """Check that a thread loads all its columns at once, of every weight row of a batch."""
    bits = config.per_lane * bits_of(dtype)
    # With several rows, threads share the channels and load 16 bytes of each.
    width, number = (bits, config.unroll) if rows == 1 else (128, config.unroll * bits // 128)
    suffix = "" if width == 32 else rf"\.{width}"
    loads = re.findall(rf"LDG\.E\.NA{suffix}\.CONSTANT", dumped(cubin, "--dump-sass"))
    assert len(loads) >= number
