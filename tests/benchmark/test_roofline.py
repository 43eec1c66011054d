import pytest
import torch

from teal.benchmark.roofline import read_bandwidth


@pytest.mark.slow
def test_memory_is_read_at_a_believable_speed(device: torch.device) -> None:
    assert 1e9 < read_bandwidth(device) < 2e13
