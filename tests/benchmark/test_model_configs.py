import pytest

from teal.benchmark.model_configs import CONFIGS, config_of
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
def test_a_model_has_its_published_size(name: str) -> None:
    assert architecture_of(config_of(name)).num_weights / 1e9 == pytest.approx(
        SIZES[name], abs=5e-3
    )


def test_sizes_make_a_llama() -> None:
    config = config_of("hidden=64,intermediate=96,layers=2,heads=4,kv-heads=2,vocab=50,context=256")
    assert (config.model_type, config.hidden_size, config.intermediate_size) == ("llama", 64, 96)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (2, 256)
    assert config.eos_token_id is None


def test_there_are_as_many_key_heads_as_heads_unless_said() -> None:
    config = config_of("hidden=64,intermediate=96,layers=2,heads=4,vocab=50")
    assert config.num_key_value_heads == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama-3-8", "Did you mean 'llama-3-8b'"),
        ("hidden=64", "lacks intermediate, layers, heads, vocab"),
        ("hidden=64,intermediate=96,layers=2,heads=4,vocab=many", "'vocab=many' is no size"),
        ("hidden=64,intermediate=96,layers=0,heads=4,vocab=50", "'layers=0' is no size"),
        ("hidden=64,width=96", "Unknown size 'width'"),
        ("hidden=64,intermediate=96,layers=2,heads=5,vocab=50", "divide evenly"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(text)
