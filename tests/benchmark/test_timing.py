import time

import pytest
import torch

from teal.benchmark.timing import time_call


def test_the_time_of_a_call_is_in_microseconds() -> None:
    timing = time_call(lambda i: time.sleep(0.002), torch.device("cpu"), least_calls=2)
    assert 2000 <= timing.low <= timing.median <= timing.high < 20_000


def test_every_input_has_its_turn(device: torch.device) -> None:
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
