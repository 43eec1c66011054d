from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.models.rope import ROPE_TYPES, ropes_of
from tests.helpers import ENGINE_FAMILIES, tiny_model

LENGTH = 100
FULL = ("full_attention",) * 2

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


def with_rope(rope_type: str, family: str = "llama") -> Any:
    parameters = {"rope_type": rope_type, "rope_theta": 500.0, **PARAMETERS[rope_type]}
    return tiny_model(family, rope_parameters=parameters)


def tables_of_transformers(model: Any, *layer_type: str) -> tuple[Tensor, Tensor]:
    """Return the model's own cosines and sines; it has each of them twice beside each other."""
    both = model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None], *layer_type)
    cosines, sines = (table[0].chunk(2, dim=-1)[0] for table in both)
    return cosines, sines


def assert_same_tables(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_tables_of_every_type_are_those_of_transformers(rope_type: str) -> None:
    model = with_rope(rope_type)
    (rope, _) = ropes_of(model.config, FULL)
    tables = rope.tables(LENGTH, torch.device("cpu"))
    assert_same_tables(tables, tables_of_transformers(model))


@pytest.mark.parametrize("family", sorted({*ENGINE_FAMILIES} - {"gemma3_text"}))
def test_tables_of_every_family_are_those_of_transformers(family: str) -> None:
    model = tiny_model(family)
    (rope, _) = ropes_of(model.config, FULL)
    tables = rope.tables(LENGTH, torch.device("cpu"))
    assert_same_tables(tables, tables_of_transformers(model))


def test_gemma3_has_tables_of_its_own_for_each_kind_of_layer() -> None:
    model = tiny_model("gemma3_text")
    kinds = ("sliding_attention", "full_attention")
    ropes = ropes_of(model.config, kinds)
    assert ropes[0] != ropes[1]
    for rope, kind in zip(ropes, kinds, strict=True):
        tables = rope.tables(LENGTH, torch.device("cpu"))
        assert_same_tables(tables, tables_of_transformers(model, kind))


def test_partial_rotary_embedding_rotates_fewer_channels() -> None:
    model = tiny_model("phi3", partial_rotary_factor=0.5)
    (rope, _) = ropes_of(model.config, FULL)
    assert len(rope.frequencies) == 2
    tables = rope.tables(LENGTH, torch.device("cpu"))
    assert_same_tables(tables, tables_of_transformers(model))


def test_yarn_scales_its_tables() -> None:
    (rope, _) = ropes_of(with_rope("yarn").config, FULL)
    cosines, _ = rope.tables(1, torch.device("cpu"))
    assert cosines[0, 0] == torch.tensor(rope.scaling) > 1.1


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_other_types_are_refused_with_all_supported(rope_type: str) -> None:
    config = with_rope(rope_type).config
    with pytest.raises(UserError, match=rf"is '{rope_type}', .* Supported: default, linear, lla"):
        ropes_of(config, FULL)
