import pytest
import torch

from teal.foundation.errors import UserError
from teal.models.placement import resolve_device, resolve_dtype


@pytest.mark.parametrize("available", [True, False], ids=["with CUDA", "without CUDA"])
def test_automatic_device_is_cuda_where_present(
    available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto").type == ("cuda" if available else "cpu")
    assert resolve_device("cpu").type == "cpu"


def test_cuda_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"No CUDA device .* Use --device cpu"):
        resolve_device("cuda")


def test_unknown_device_and_dtype_are_refused_with_all_known() -> None:
    with pytest.raises(UserError, match=r"Unknown device 'tpu'.*Known: auto, cpu, cuda"):
        resolve_device("tpu")
    with pytest.raises(UserError, match=r"Unknown dtype 'int8'.*Known: auto, float32, bfloat16"):
        resolve_dtype("int8")


def test_automatic_dtype_is_left_to_the_checkpoint() -> None:
    assert resolve_dtype("auto") == "auto"
    assert resolve_dtype("bfloat16") is torch.bfloat16
