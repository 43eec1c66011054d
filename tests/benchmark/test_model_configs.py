import pytest

from teal.benchmark.model_configs import CONFIGS, config_of, shapes_of
from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of

# Parameters in billions, as their publishers give them.
SIZES = {
    "llama-2-7b": 6.74,
    "llama-3-70b": 70.55,
    "llama-3-8b": 8.03,
    "llama-3.2-3b": 3.21,
    "mistral-7b": 7.24,
    "qwen2.5-7b": 7.62,
    "qwen3-8b": 8.19,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_known_models_have_their_published_size(name: str) -> None:
    assert architecture_of(config_of(name)).num_weights / 1e9 == pytest.approx(
        SIZES[name], abs=5e-3
    )


def test_sizes_describe_a_llama() -> None:
    config = config_of("hidden=64,intermediate=96,layers=2,heads=4,kv-heads=2,vocab=50,context=256")
    assert (config.model_type, config.hidden_size, config.intermediate_size) == ("llama", 64, 96)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (2, 256)
    assert config.eos_token_id is None


def test_key_heads_default_to_heads() -> None:
    config = config_of("hidden=64,intermediate=96,layers=2,heads=4,vocab=50")
    assert config.num_key_value_heads == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-3-8", "Did you mean 'llama-3-8b'"),
        ("hidden=64", "lacks intermediate, layers, heads, vocab"),
        ("hidden=64,intermediate=96,layers=2,heads=4,vocab=many", "'vocab=many' is not a size"),
        ("hidden=64,intermediate=96,layers=0,heads=4,vocab=50", "'layers=0' is not a size"),
        ("hidden=64,width=96", "Unknown size 'width'"),
        ("hidden=64,intermediate=96,layers=2,heads=5,vocab=50", "divide evenly"),
    ],
)
def test_unknown_or_incomplete_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(text)


def test_model_name_means_the_four_products_of_its_layer() -> None:
    shapes = {(s.form, s.in_features, s.out_features) for s in shapes_of("llama-3-8b")}
    assert shapes == {
        ("parts", 4096, 6144),
        ("plain", 4096, 4096),
        ("gated", 4096, 28672),
        ("plain", 14336, 4096),
    }


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_products_of_a_layer_fit_together(name: str) -> None:
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
def test_size_means_one_product(
    name: str, form: str, output_sizes: tuple[int, ...], shown: str
) -> None:
    (shape,) = shapes_of(name)
    assert (shape.form, shape.in_features, shape.output_sizes) == (form, 63, output_sizes)
    assert shape.name == shown


@pytest.mark.parametrize(
    "name", ["llama-3-9b", "63", "x", "0x5", "63x2x0", "63x8+0", "63x129x2", "63x1+1+1+1"]
)
def test_name_that_is_neither_model_nor_size_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        shapes_of(name)
