"""What NVIDIA's tools tell of a compiled kernel."""

import re
import subprocess
from pathlib import Path

import pytest


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
