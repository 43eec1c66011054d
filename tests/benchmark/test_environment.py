import pytest
import torch

from teal.benchmark.environment import PeakMemory, describe_machine, device_name


def test_record_names_device_versions_and_commit(device: torch.device) -> None:
    machine = describe_machine(device, "abc")
    assert machine["device"] == device_name(device)
    assert machine["device"]
    assert machine["commit"] == "abc"
    assert torch.__version__.startswith(machine["versions"]["torch"])


@pytest.mark.gpu
def test_peak_counts_memory_that_was_freed_again() -> None:
    device = torch.device("cuda")
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    peak = PeakMemory(device)
    expected = torch.empty(3 << 20, dtype=torch.uint8, device=device)
    passing = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    del passing
    assert peak.beyond(3 << 20) == 1 << 20
    del expected, kept


def test_peak_is_unknown_on_a_cpu() -> None:
    assert PeakMemory(torch.device("cpu")).beyond(0) is None
