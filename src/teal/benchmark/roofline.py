"""How fast memory can be read: the limit of every product of one row."""

import torch
from torch import Tensor

from teal.benchmark.timing import time_call

_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}


def read_bandwidth(device: torch.device) -> float:
    """Measure how many bytes a second a plain sum over a large array reads.

    Args:
        device: Whose memory is read.

    Returns:
        Bytes per second.
    """
    halves = torch.ones(2, _BYTES[device.type] // 4, dtype=torch.float32, device=device)

    def read(i: int) -> Tensor:
        return halves[i % 2].sum()

    timing = time_call(read, device, least_calls=2)
    return halves[0].nbytes / (timing.median * 1e-6)
