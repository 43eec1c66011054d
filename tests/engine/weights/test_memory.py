import pytest
import torch

from teal.engine.weights.memory import free_memory, require_memory
from teal.foundation.errors import UserError

CPU = torch.device("cpu")


def test_enough_memory_is_accepted() -> None:
    require_memory(1, CPU, "Nothing")


def test_too_little_memory_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.engine.weights.memory.free_memory", lambda device: 2_000_000_000)
    message = r"^The weights need 14\.5 GB and cpu has 2\.0 GB free\. Take a smaller"
    with pytest.raises(UserError, match=message):
        require_memory(14_500_000_000, CPU, "The weights")


def test_unknown_free_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.engine.weights.memory.free_memory", lambda device: None)
    require_memory(10**18, CPU, "The weights")


def test_free_memory_of_another_device_is_unknown() -> None:
    assert free_memory(torch.device("meta")) is None


def test_free_memory_shrinks_by_what_is_allocated(device: torch.device) -> None:
    size = 256 * 1024**2
    before = free_memory(device)
    kept = torch.ones(size, dtype=torch.uint8, device=device)
    after = free_memory(device)
    assert before is not None
    assert after is not None
    assert before - after > len(kept) // 2
