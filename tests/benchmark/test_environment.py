import torch

from teal.benchmark.environment import describe_machine


def test_the_machine_is_described_by_device_versions_and_commit(device: torch.device) -> None:
    machine = describe_machine(device, "abc")
    assert machine["device"]
    assert machine["commit"] == "abc"
    assert torch.__version__.startswith(machine["versions"]["torch"])
