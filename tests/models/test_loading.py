import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal.checkpoints.location import load_config
from teal.foundation.errors import UserError
from teal.models.loading import context_length, load_model, load_tokenizer
from tests.helpers import tiny_model

TRAINED = Path(__file__).parents[2] / "models/py-16m"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_model_is_opened_for_inference_in_the_dtype_asked_for(
    dtype: str, expected: torch.dtype, saved: Path
) -> None:
    model = load_model(str(saved), dtype=dtype, device="cpu")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.device == torch.device("cpu")


def test_opened_model_has_the_weights_that_were_saved(saved: Path) -> None:
    expected = tiny_model("llama").to(torch.bfloat16).state_dict()
    found = load_model(str(saved), device="cpu").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_model_with_tied_embeddings_is_complete(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_context_length_is_that_of_the_configuration(saved: Path) -> None:
    assert context_length(load_config(str(saved))) == 128


def test_tokenizer_is_that_of_the_folder() -> None:
    tokenizer = load_tokenizer(str(TRAINED))
    code = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer(code)["input_ids"]) == code


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_source_that_is_no_model_is_refused(load: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for source in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(UserError, match=r"is not a model folder\. Give a folder with config"):
            load(str(source))
    with pytest.raises(UserError, match=r"no config\.json\. Give a folder that save_pretrained"):
        load(str(tmp_path))


def test_unsupported_model_type_is_refused_before_weights_are_read(folder: Path) -> None:
    edit_config(folder, model_type="gpt2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'gpt2' is not supported\. Supported: gemma2"):
        load_model(str(folder))


def test_damaged_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"^Cannot open the model configuration .* Check the fold"):
        load_model(str(folder))


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^Cannot open the model of .* Check the folder"):
        load_model(str(folder))


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^Cannot open the model of .* Check the folder"):
        load_model(str(folder))


def test_weights_that_lack_a_projection_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight\. Use a"):
        load_model(str(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    with pytest.raises(UserError, match=r"^Cannot open the model of .* Check the folder"):
        load_model(str(folder))


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^Cannot open the tokenizer of .* Check the folder"):
        load_tokenizer(str(folder))


def test_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(TRAINED / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^Cannot open the tokenizer of .* Check the folder"):
        load_tokenizer(str(tmp_path))
