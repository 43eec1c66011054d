import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teal.benchmark.baselines import CompiledStep, Generate, LlamaCpp, make_baselines
from teal.foundation.errors import UserError
from tests.helpers import tiny_model

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip compilation, which would take longer than all of these tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_generate_is_timed_per_token() -> None:
    baseline = Generate(tiny_model("llama"), is_compiled=False)
    assert baseline.name == "transformers"
    assert 0.0 < baseline.time(PROMPT, 5) < 1e6


def test_compiled_generate_is_given_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    given: dict[str, Any] = {}

    def generate(ids: torch.Tensor, **options: Any) -> None:
        given.update(options)
        for value in (ids, 1, 2, 3):
            options["streamer"].put(value)

    monkeypatch.setattr(model, "generate", generate)
    assert Generate(model, is_compiled=True).time(PROMPT, 3) > 0.0
    assert given["cache_implementation"] == "static"
    assert given["compile_config"]._compile_all_devices
    assert given["max_new_tokens"] == given["min_new_tokens"] == 3


def test_compiled_step_decodes_the_tokens_of_transformers(
    eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    baseline = CompiledStep(model)
    tokens: list[int] = []
    step = baseline._step

    def recorded(token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        tokens.append(int(token))
        return step(token, positions)

    monkeypatch.setattr(baseline, "_step", recorded)
    for _ in range(2):
        tokens.clear()
        assert baseline.time(PROMPT, 6) > 0.0
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert tokens == expected[0, 4:-1].tolist()


class Llama:
    """Has the interface of llama_cpp.Llama."""

    def __init__(self, **options: Any) -> None:
        self.fed: list[int] = []

    def reset(self) -> None:
        self.fed = []

    def eval(self, tokens: list[int]) -> None:
        self.fed += tokens

    def sample(self, temp: float) -> int:
        assert temp == 0.0
        return len(self.fed)


def test_llama_cpp_is_fed_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    (tmp_path / "model.gguf").touch()
    (baseline,) = make_baselines(["llama-cpp"], None, tmp_path / "model.gguf")
    assert isinstance(baseline, LlamaCpp)
    assert baseline.time(PROMPT, 4) > 0.0
    assert baseline._model.fed == [*PROMPT, 4, 5, 6]


def test_baselines_are_made_by_name(eager: None) -> None:
    names = ["transformers", "transformers-compiled", "torch-compile"]
    assert [baseline.name for baseline in make_baselines(names, tiny_model("llama"), None)] == names


def test_error_names_what_a_baseline_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Unknown baseline 'gpt-fast'"):
        make_baselines(["gpt-fast"], None, None)
    with pytest.raises(UserError, match="Give --gguf FILE"):
        make_baselines(["llama-cpp"], None, None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="pip install llama-cpp-python"):
        make_baselines(["llama-cpp"], None, tmp_path / "model.gguf")
