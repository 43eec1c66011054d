from teal.allocation.budget import AllocationRequest
from teal.allocation.uniform import uniform_sparsities
from teal.calibration import calibrate
from tests.helpers import tiny_model, tiny_tokens


def test_every_projection_gets_the_budget_of_the_model() -> None:
    stats = calibrate(tiny_model("llama"), tiny_tokens(1, 16))
    request = AllocationRequest(stats=stats, sparsity=0.3)
    assert uniform_sparsities(request) == dict.fromkeys(stats.model.shapes, 0.3)


def test_only_target_modules_are_planned() -> None:
    stats = calibrate(tiny_model("llama"), tiny_tokens(1, 16))
    request = AllocationRequest(stats=stats, sparsity=0.3, target_modules=["down_proj"])
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert uniform_sparsities(request) == dict.fromkeys(names, 0.3)
