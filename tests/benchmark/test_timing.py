import time

import pytest
import torch

from teal.benchmark.timing import read_bandwidth, time_call


def test_times_are_in_microseconds() -> None:
    timing = time_call(lambda i: time.sleep(0.002), torch.device("cpu"), least_calls=2)
    assert 2000 <= timing.low <= timing.median <= timing.high < 20_000


def test_every_input_is_used(device: torch.device) -> None:
    seen: set[int] = set()
    x = torch.zeros(1, device=device)

    def call(i: int) -> None:
        seen.add(i)
        x.add_(1)

    time_call(call, device, least_calls=7)
    assert seen >= set(range(7))


@pytest.mark.gpu
def test_a_larger_product_takes_longer() -> None:
    device = torch.device("cuda")
    sizes = (1 << 20, 1 << 26)
    arrays = [torch.ones(size, device=device) for size in sizes]
    small, large = (
        time_call(lambda i, a=array: a.sum(), device, least_calls=1) for array in arrays
    )
    assert large.median > 3 * small.median


@pytest.mark.slow
def test_memory_bandwidth_is_plausible(device: torch.device) -> None:
    assert 1e9 < read_bandwidth(device) < 2e13
