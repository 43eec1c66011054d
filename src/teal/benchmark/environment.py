"""What a measurement ran on: device, driver, versions, commit; and how much memory it took."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("teal", "torch", "transformers", "triton", "numba")


def describe_machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return the provenance that every record carries, in a JSON form.

    Args:
        device: Device that was measured.
        commit: Commit of the code; by default git is asked.
    """
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "threads": None if cuda else torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit or _output("git", "rev-parse", "HEAD"),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


class PeakMemory:
    """Tracks the most memory that is allocated on a GPU from now on.

    Args:
        device: Device to track.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def beyond(self, expected: int) -> int | None:
        """Return the peak in bytes less `expected` bytes; `None` on a CPU."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before - expected


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
