"""Python code in a model folder is never run, whatever names it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teal.checkpoints.location import load_config
from teal.engine.engine import Engine
from teal.foundation.errors import UserError
from teal.models.loading import load_model, load_tokenizer

MODEL = Path(__file__).parents[2] / "models/py-16m"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class Config(LlamaConfig):
    model_type = {model_type!r}

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "planted.Config",
    "AutoModelForCausalLM": "planted.Model",
    "AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"],
}


class Planted:
    """A model folder with Python code that leaves a marker when it is imported."""

    def __init__(self, folder: Path, model_type: str, **tokenizer: Any) -> None:
        self.folder = folder / "model"
        self.marker = folder / "was-run"
        shutil.copytree(MODEL, self.folder)
        code = CODE.format(marker=str(self.marker), model_type=model_type)
        (self.folder / "planted.py").write_text(code)
        self._edit("config.json", model_type=model_type, auto_map=AUTO_MAP)
        self._edit("tokenizer_config.json", auto_map=AUTO_MAP, **tokenizer)

    def _edit(self, name: str, **changes: Any) -> None:
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def _yes_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")


@pytest.mark.parametrize("opened", [load_config, load_model, Engine], ids=lambda f: f.__name__)
def test_a_model_type_that_needs_code_is_refused_and_its_code_not_run(
    opened: Any, tmp_path: Path
) -> None:
    planted = Planted(tmp_path, "planted")
    with pytest.raises(UserError, match="needs Python code of its own, which teal never runs"):
        opened(str(planted.folder))
    assert not planted.marker.exists()


def test_a_tokenizer_that_needs_code_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    planted = Planted(tmp_path, "planted", tokenizer_class="Tokenizer")
    with pytest.raises(UserError, match="needs Python code of its own, which teal never runs"):
        load_tokenizer(str(planted.folder))
    assert not planted.marker.exists()


@pytest.mark.parametrize("opened", [load_model, load_tokenizer, Engine], ids=lambda f: f.__name__)
def test_code_beside_a_type_that_transformers_includes_is_not_run(
    opened: Any, tmp_path: Path
) -> None:
    planted = Planted(tmp_path, "llama")
    opened(str(planted.folder))
    assert not planted.marker.exists()
