"""Whether something fits into the memory of a device, asked before it is put there."""

from pathlib import Path

import torch

from teal.foundation.errors import UserError

_GB = 1e9
_MEMINFO = Path("/proc/meminfo")


def require_memory(needed: int, device: torch.device, what: str) -> None:
    """Check that `needed` bytes are free on a device.

    Args:
        needed: Bytes.
        device: The device.
        what: What needs them, such as "The weights", for the message.

    Raises:
        UserError: Fewer are free; the message says how many are needed and there.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} need {needed / _GB:.1f} GB and {device} has {free / _GB:.1f} GB free. "
            "Take a smaller model, dtype or context, or a larger device."
        )


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device, or `None` where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Blocks that torch keeps for itself are as good as free.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    if device.type == "cpu" and _MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None
