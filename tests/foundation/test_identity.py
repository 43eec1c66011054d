import json

import pytest

from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity

IDENTITY = ModelIdentity(model_type="llama", shapes={"q": (4, 2), "k": (4, 1), "down": (12, 4)})


def changed(model_type: str = "llama", **shapes: tuple[int, int] | None) -> ModelIdentity:
    merged = {**IDENTITY.shapes, **shapes}
    present = {name: shape for name, shape in merged.items() if shape is not None}
    return ModelIdentity(model_type=model_type, shapes=present)


def test_mean_sparsity_is_weighted_by_weight_size() -> None:
    assert IDENTITY.mean_sparsity({"q": 0.5, "down": 0.25}) == (8 * 0.5 + 48 * 0.25) / 56


def test_mean_sparsity_of_nothing_is_zero() -> None:
    assert IDENTITY.mean_sparsity({}) == 0.0


def test_model_with_the_same_type_and_shapes_is_accepted() -> None:
    IDENTITY.require(changed(), "plan")


@pytest.mark.parametrize(
    ("other", "mismatch"),
    [
        (changed("mistral", q=None), "model type 'llama' here, 'mistral' in the model"),
        (changed(k=None, down=(1, 1)), "k is 4→1 here, absent in the model"),
        (changed(q=(4, 3), down=None), "q is 4→2 here, 4→3 in the model"),
        (changed(o=(2, 4)), "o is absent here, 2→4 in the model"),
    ],
    ids=["type", "missing projection", "shape", "further projection"],
)
def test_another_model_is_refused_with_the_first_mismatch(
    other: ModelIdentity, mismatch: str
) -> None:
    with pytest.raises(UserError) as caught:
        IDENTITY.require(other, "plan")
    assert f"The plan belongs to another model: {mismatch}. Use the model" in str(caught.value)


def test_json_form_keeps_everything_and_its_order() -> None:
    rebuilt = ModelIdentity.from_dict(json.loads(json.dumps(IDENTITY.to_dict())))
    assert rebuilt == IDENTITY
    assert list(rebuilt.shapes) == list(IDENTITY.shapes)
