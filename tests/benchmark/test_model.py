import pytest
import torch

from teal.benchmark.model import BenchmarkModel, Workload
from teal.engine.decoder import Decoder
from teal.engine.weights.loader import open_model
from teal.foundation.errors import UserError
from tests.helpers import tiny_model

WORKLOAD = Workload(prompt_tokens=8, new_tokens=12, repeats=2)


@pytest.fixture
def model(device: torch.device) -> BenchmarkModel:
    tiny = tiny_model("llama", hidden_size=64, intermediate_size=128).to(device)
    return BenchmarkModel("tiny", open_model(tiny), WORKLOAD)


def test_effective_sparsity_is_close_to_the_target(model: BenchmarkModel) -> None:
    engines = model.engines([0.0, 0.3, 0.6])
    assert model.effective_sparsity(engines[0.0]) == {}
    for sparsity in (0.3, 0.6):
        effective = model.effective_sparsity(engines[sparsity])
        assert len(effective) == 14
        assert model.mean_sparsity(effective) == pytest.approx(sparsity, abs=0.06)


def test_token_reads_kept_weights_head_and_cache(model: BenchmarkModel) -> None:
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    head, cached = 97 * 64, 2 * 2 * 32 * (8 + 6)
    assert model.bytes_read({}) == 4 * (2 * layer + head + cached)
    saved = model.bytes_read({}) - model.bytes_read({"model.layers.1.mlp.down_proj": 0.5})
    assert saved == 4 * 64 * 128 / 2


def test_token_reads_codes_scales_and_a_quantized_head() -> None:
    tiny = tiny_model("llama", hidden_size=64, intermediate_size=128)
    quantized = open_model(tiny, quantize="int8", quantize_head=True)
    model = BenchmarkModel("tiny", quantized, WORKLOAD)
    codes, scales = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128, 2 * 64 + 64 + 2 * 128 + 64
    cached = 4 * 2 * 2 * 32 * (8 + 6)
    head = 97 * 64 + 97 * 4
    assert model.bytes_read({}) == 2 * (codes + 4 * scales) + head + cached
    floats = BenchmarkModel("tiny", open_model(tiny), WORKLOAD)
    assert model.bytes_of_floats() == floats.bytes_read({})


def test_sliding_window_bounds_the_bytes_read_of_the_cache() -> None:
    fields = {"use_sliding_window": False, "sliding_window": 5}
    windowed = BenchmarkModel("tiny", open_model(tiny_model("mistral", **fields)), WORKLOAD)
    full = BenchmarkModel("tiny", open_model(tiny_model("llama")), WORKLOAD)
    assert full.bytes_read({}) - windowed.bytes_read({}) == 4 * 2 * 2 * 16 * (14 - 5)


def test_correct_step_passes_the_check(model: BenchmarkModel) -> None:
    model.check()


def test_wrong_step_is_found(model: BenchmarkModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *given: step(*given).roll(1, -1))
    with pytest.raises(UserError, match="wrong step"):
        model.check()


def test_workload_beyond_the_context_is_refused() -> None:
    workload = Workload(prompt_tokens=100, new_tokens=29, repeats=1)
    with pytest.raises(UserError, match="exceed the context of tiny, 128"):
        BenchmarkModel("tiny", open_model(tiny_model("llama")), workload)


@pytest.mark.parametrize("changed", ["prompt_tokens", "new_tokens", "repeats"])
def test_workload_too_small_to_time_is_refused(changed: str) -> None:
    with pytest.raises(UserError, match="at least 1, 2 and 1"):
        Workload(**{"prompt_tokens": 1, "new_tokens": 2, "repeats": 1, changed: 0})
