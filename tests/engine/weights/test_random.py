import pytest
import torch

from teal.engine.weights.random import random_weights
from teal.engine.weights.transformers import from_model
from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of
from tests.engine.decoding import assert_same_weights, tensors_of
from tests.helpers import ENGINE_FAMILIES, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_random_weights_have_the_shapes_of_the_model(family: str) -> None:
    model = tiny_model(family)
    weights = random_weights(architecture_of(model.config), torch.float32, CPU)
    for first, second in zip(tensors_of(weights), tensors_of(from_model(model)), strict=True):
        assert (first is None) is (second is None)
        if first is not None and second is not None:
            assert first.shape == second.shape
            assert first.is_contiguous()


def test_random_weights_depend_on_the_seed_alone() -> None:
    architecture = architecture_of(tiny_model("llama").config)
    one, same, other = (
        random_weights(architecture, torch.float32, CPU, seed=seed) for seed in (1, 1, 2)
    )
    assert_same_weights(one, same)
    assert not torch.equal(one.layers[0].qkv, other.layers[0].qkv)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_random_weights_keep_the_scale_of_their_input(family: str) -> None:
    config = tiny_model(family, hidden_size=256, intermediate_size=512).config
    weights = random_weights(architecture_of(config), torch.float32, CPU)
    layer = weights.layers[0]
    assert float(layer.down.std()) == pytest.approx(512**-0.5, rel=0.05)
    assert float(layer.qkv.std()) == pytest.approx(256**-0.5, rel=0.05)
    assert layer.mlp_norm is not None
    assert torch.equal(layer.mlp_norm, torch.ones(256))


def test_random_weights_too_large_for_the_device_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teal.engine.weights.memory.free_memory", lambda device: 0)
    with pytest.raises(UserError, match=r"^The weights need .* free\. Take a smaller"):
        random_weights(architecture_of(tiny_model("llama").config), torch.float32, CPU)
