import pytest

from teal.benchmark.shapes import MODELS, shapes_of
from teal.foundation.errors import UserError


def test_a_model_name_stands_for_the_four_products_of_its_layer() -> None:
    shapes = {(s.form, s.in_features, s.out_features) for s in shapes_of("llama-3-8b")}
    assert shapes == {
        ("parts", 4096, 6144),
        ("plain", 4096, 4096),
        ("gated", 4096, 28672),
        ("plain", 14336, 4096),
    }


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_products_of_a_layer_fit_together(name: str) -> None:
    qkv, o, gate_up, down = shapes_of(name)
    assert o.in_features == qkv.output_sizes[0]
    assert qkv.in_features == gate_up.in_features == o.out_features == down.out_features
    assert set(gate_up.output_sizes) == {down.in_features}


@pytest.mark.parametrize(
    ("name", "form", "output_sizes", "shown"),
    [
        ("63x129", "plain", (129,), "63 → 129"),
        ("63x2x129", "gated", (129, 129), "63 → 2×129"),
        ("63x80+16+16", "parts", (80, 16, 16), "63 → 112"),
    ],
)
def test_a_size_stands_for_one_product(
    name: str, form: str, output_sizes: tuple[int, ...], shown: str
) -> None:
    (shape,) = shapes_of(name)
    assert (shape.form, shape.in_features, shape.output_sizes) == (form, 63, output_sizes)
    assert shape.name == shown


@pytest.mark.parametrize(
    "name", ["llama-3-9b", "63", "x", "0x5", "63x2x0", "63x8+0", "63x129x2", "63x1+1+1+1"]
)
def test_what_is_neither_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        shapes_of(name)
