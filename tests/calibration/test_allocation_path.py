import torch

from teal.calibration.allocation_path import AllocationPath


def test_path_comes_back_from_its_dict_and_tensors() -> None:
    path = AllocationPath(
        settings={"step": 0.05, "text": {"sha256": None}},
        sparsities={"model.layers.0.mlp.down_proj": torch.tensor([0.0, 0.1]).double()},
        errors={"model.layers.0": torch.tensor([0.0, 0.3]).double()},
    )
    content, tensors = path.to_dict(), path.to_tensors("paths.greedy")
    rebuilt = AllocationPath.from_dict(content, tensors, "paths.greedy")
    assert all(name.startswith("paths.greedy.") for name in tensors)
    assert rebuilt.to_dict() == content
    for name, tensor in rebuilt.to_tensors("paths.greedy").items():
        assert torch.equal(tensor, tensors[name])
