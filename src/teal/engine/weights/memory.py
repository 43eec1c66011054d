"""Checks that tensors will fit into the memory of a device."""

from pathlib import Path

import torch

from teal.foundation.errors import UserError

_GB = 1e9
_MEMINFO = Path("/proc/meminfo")


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Check that `needed` bytes are free on a device.

    Args:
        needed: Size in bytes.
        device: Device to check.
        what: What needs the memory, for the message, such as "The weights".

    Raises:
        UserError: Fewer bytes are free; the message gives both sizes.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} need {needed / _GB:.1f} GB and {device} has {free / _GB:.1f} GB free. "
            "Take a smaller model, dtype or context, or a larger device."
        )


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or `None` if it is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Blocks in the cache of torch can be reused.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    if device.type == "cpu" and _MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None
