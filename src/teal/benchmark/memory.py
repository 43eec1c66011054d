"""How much memory a call takes on a GPU."""

import torch


class MemoryTaken:
    """Counts from now on what is allocated at most.

    Args:
        device: Where to look.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def beyond(self, expected: int) -> int | None:
        """Return how many bytes more than `expected` were allocated at a time; `None` on a CPU."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._before - expected
