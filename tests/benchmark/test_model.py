import pytest
import torch

from teal.benchmark.model import BenchmarkModel, Workload
from teal.engine.decoder import Decoder
from teal.engine.weights.loader import open_model
from teal.foundation.errors import UserError
from tests.helpers import tiny_model

WORKLOAD = Workload(prompt_tokens=8, new_tokens=12, repeats=2)


@pytest.fixture
def subject(device: torch.device) -> BenchmarkModel:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128).to(device)
    return BenchmarkModel("tiny", open_model(model), WORKLOAD)


def test_thresholds_drop_about_what_was_asked_for(subject: BenchmarkModel) -> None:
    engines = subject.engines([0.0, 0.3, 0.6])
    assert subject.effective_sparsity(engines[0.0]) == {}
    for sparsity in (0.3, 0.6):
        effective = subject.effective_sparsity(engines[sparsity])
        assert len(effective) == 14
        assert subject.mean_sparsity(effective) == pytest.approx(sparsity, abs=0.06)


def test_a_token_reads_what_is_kept_and_head_and_cache(subject: BenchmarkModel) -> None:
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    head, cached = 97 * 64, 2 * 2 * 32 * (8 + 6)
    assert subject.bytes_read({}) == 4 * (2 * layer + head + cached)
    saved = subject.bytes_read({}) - subject.bytes_read({"model.layers.1.mlp.down_proj": 0.5})
    assert saved == 4 * 64 * 128 / 2


def test_a_token_reads_codes_scales_and_a_head_of_codes() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    opened = open_model(model, quantize="int8", quantize_head=True)
    subject = BenchmarkModel("tiny", opened, WORKLOAD)
    codes, scales = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128, 2 * 64 + 64 + 2 * 128 + 64
    cached = 4 * 2 * 2 * 32 * (8 + 6)
    head = 97 * 64 + 97 * 4
    assert subject.bytes_read({}) == 2 * (codes + 4 * scales) + head + cached
    assert subject.bytes_of_floats() == BenchmarkModel(
        "tiny", open_model(model), WORKLOAD
    ).bytes_read({})


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    fields = {"use_sliding_window": False, "sliding_window": 5}
    model = tiny_model("mistral", **fields)
    windowed = BenchmarkModel("tiny", open_model(model), WORKLOAD)
    full = BenchmarkModel("tiny", open_model(tiny_model("llama")), WORKLOAD)
    assert full.bytes_read({}) - windowed.bytes_read({}) == 4 * 2 * 2 * 16 * (14 - 5)


def test_a_right_step_passes_the_check(subject: BenchmarkModel) -> None:
    subject.check()


def test_a_wrong_step_is_found(subject: BenchmarkModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *given: step(*given).roll(1, -1))
    with pytest.raises(UserError, match="wrong step"):
        subject.check()


def test_a_workload_beyond_the_context_is_refused() -> None:
    workload = Workload(prompt_tokens=100, new_tokens=29, repeats=1)
    with pytest.raises(UserError, match="exceed the context of tiny, 128"):
        BenchmarkModel("tiny", open_model(tiny_model("llama")), workload)


@pytest.mark.parametrize("changed", ["prompt_tokens", "new_tokens", "repeats"])
def test_a_workload_without_time_is_refused(changed: str) -> None:
    with pytest.raises(UserError, match="at least 1, 2 and 1"):
        Workload(**{"prompt_tokens": 1, "new_tokens": 2, "repeats": 1, changed: 0})
