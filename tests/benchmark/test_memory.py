import pytest
import torch

from teal.benchmark.memory import MemoryTaken


@pytest.mark.gpu
def test_what_is_allocated_beyond_the_expected_counts_even_if_it_is_freed() -> None:
    device = torch.device("cuda")
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    taken = MemoryTaken(device)
    expected = torch.empty(3 << 20, dtype=torch.uint8, device=device)
    passing = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    del passing
    assert taken.beyond(3 << 20) == 1 << 20
    del expected, kept


def test_a_cpu_does_not_count() -> None:
    assert MemoryTaken(torch.device("cpu")).beyond(0) is None
