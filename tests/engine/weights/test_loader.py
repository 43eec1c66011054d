import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.engine.weights.loader import open_model
from teal.foundation.errors import UserError
from tests.helpers import tiny_model

MODEL = Path(__file__).parents[3] / "models/py-16m"


def test_folder_brings_its_tokenizer_and_end_tokens() -> None:
    opened = open_model(MODEL)
    assert opened.tokenizer is not None
    assert opened.end_tokens == {0}
    assert opened.weights.embedding.dtype == torch.bfloat16


def test_folder_is_opened_in_the_dtype_asked_for() -> None:
    assert open_model(MODEL, dtype="float32").weights.embedding.dtype == torch.float32


def test_end_tokens_come_from_the_generation_configuration(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert open_model(tmp_path / "model").end_tokens == {5, 7}


def test_folder_without_a_tokenizer_is_opened_without_one(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    assert open_model(tmp_path / "model").tokenizer is None


def test_model_in_memory_shares_its_weights() -> None:
    model = tiny_model("llama")
    opened = open_model(model)
    assert opened.weights.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert opened.end_tokens == {2}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        pytest.param("no-such-folder", {}, "not a model folder", id="missing"),
        pytest.param(MODEL, {"device": "tpu"}, "Unknown device", id="device"),
        pytest.param(MODEL, {"dtype": "int8"}, "Unknown dtype", id="dtype"),
        pytest.param(MODEL, {"quantize": "int3"}, "Unknown format 'int3'", id="format"),
        pytest.param(tiny_model("llama"), {"dtype": "float32"}, "stays as it is", id="in memory"),
        pytest.param(torch.nn.Linear(2, 2), {}, "not a Hugging Face", id="no model"),
    ],
)
def test_bad_source_or_option_is_refused(
    source: Any, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_model(source, **options)
