"""What NVIDIA's tools tell of a compiled kernel."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from teal.kernels.cuda.tile_config import TileConfig, bits_of


def told(cubin: Path, option: str) -> str:
    """Return what NVIDIA's tools say of a compiled kernel."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("needs the tools in triton's wheel")
    command = [cuobjdump, option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_no_spills(cubin: Path) -> None:
    used = told(cubin, "--dump-resource-usage")
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", used)) == {"0"}


def assert_strips_load_whole(
    cubin: Path, config: TileConfig, dtype: torch.dtype, rows: int = 1
) -> None:
    """Check that a thread asks at once for all its columns, of every strip under way."""
    bits = config.per_lane * bits_of(dtype)
    # Threads share the channels that several rows ask for, and read 16 bytes of each.
    width, number = (bits, config.unroll) if rows == 1 else (128, config.unroll * bits // 128)
    suffix = "" if width == 32 else rf"\.{width}"
    loads = re.findall(rf"LDG\.E\.NA{suffix}\.CONSTANT", told(cubin, "--dump-sass"))
    assert len(loads) >= number
