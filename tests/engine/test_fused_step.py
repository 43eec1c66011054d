from typing import Any

import pytest
import torch
from torch import Tensor

from teal.engine.decoder import Decoder, Stepper
from teal.engine.engine import Engine
from teal.engine.fused_step import FusedStep, fused_step_obstacle, stepper_of
from teal.methods import MaskRule
from tests.engine.decoding import cache_for, decoder_of, plan_at
from tests.helpers import ENGINE_FAMILIES, relative_error, tiny_model, tiny_tokens

FUSED = ("llama", "mistral", "phi3", "qwen2", "qwen3", "granite")
# Small, but of sizes that the kernels take.
SIZES = {"hidden_size": 64, "intermediate_size": 176, "head_dim": 32}
PROMPT, STEPS = 9, 7


def _model(family: str, **changes: Any) -> Any:
    return tiny_model(family, **{**SIZES, **changes})


def _decoder(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Decoder:
    return decoder_of(_model(family, **changes).to("cuda", dtype))


def _logits(decoder: Decoder, fused: bool, steps: int = STEPS, capacity: int = 64) -> Tensor:
    tokens = tiny_tokens(1, PROMPT + steps)[0].cuda()
    cache = cache_for(decoder, capacity=capacity)
    step: Stepper = FusedStep(decoder, cache) if fused else decoder.step
    logits = [decoder.prefill(tokens[:PROMPT], cache)]
    logits += [step(token[None], cache)[0].clone() for token in tokens[PROMPT:]]
    return torch.stack(logits)


def _exact(family: str, **changes: Any) -> Tensor:
    """Logits of the same weights, rounded to bfloat16, in float32."""
    model = _model(family, **changes).bfloat16().float()
    return _logits(decoder_of(model.cuda()), fused=False)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FUSED)
def test_dense_steps_are_as_accurate_as_those_of_the_general_path(family: str) -> None:
    decoder = _decoder(family)
    exact = _exact(family)
    general = relative_error(_logits(decoder, fused=False), exact)
    assert relative_error(_logits(decoder, fused=True), exact) <= 2 * general


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [48, 80])
def test_head_dim_need_not_be_a_power_of_two(head_dim: int) -> None:
    decoder = _decoder("llama", head_dim=head_dim)
    exact = _exact("llama", head_dim=head_dim)
    general = relative_error(_logits(decoder, fused=False), exact)
    assert relative_error(_logits(decoder, fused=True), exact) <= 2 * general


@pytest.mark.gpu
def test_biases_are_added() -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    decoder = _decoder("llama", **changes)
    assert decoder.weights.layers[0].o_bias is not None
    exact = _exact("llama", **changes)
    general = relative_error(_logits(decoder, fused=False), exact)
    assert relative_error(_logits(decoder, fused=True), exact) <= 2 * general


@pytest.mark.gpu
def test_layer_drops_what_the_general_path_drops() -> None:
    decoder = _decoder("llama", torch.float16, num_hidden_layers=1)
    plan = plan_at(decoder, tiny_tokens(1, 32)[0].cuda(), 0.5)
    dense = _logits(decoder, fused=True)
    rules = {name: planned.rule for name, planned in plan.projections.items()}
    for name in rules:
        # One at a time: further on, one activation at a threshold changes all that follows.
        decoder.set_rules({name: rules[name]})
        fused, general = (_logits(decoder, fused=fused) for fused in (True, False))
        difference = (fused - general).norm(dim=-1) / general.norm(dim=-1)
        assert difference.median() < 5e-3, name
        assert relative_error(fused, dense) > 2e-2, name


@pytest.mark.gpu
def test_dropping_everything_leaves_the_embedding() -> None:
    decoder = _decoder("llama")
    decoder.set_rules(
        {name: MaskRule(threshold=1e30) for name in decoder.architecture.identity.shapes}
    )
    fused, general = (_logits(decoder, fused=fused)[1:] for fused in (True, False))
    torch.testing.assert_close(fused, general, rtol=0, atol=0)


@pytest.mark.gpu
def test_captured_step_equals_the_eager_one_bit_for_bit_every_time() -> None:
    engine = Engine(_model("llama").to("cuda", torch.bfloat16))
    prompt = tiny_tokens(1, PROMPT)[0].tolist()
    captured = [engine.generate(prompt, max_new_tokens=40, stop_tokens=()) for _ in range(3)]
    assert captured[0].tokens == captured[1].tokens == captured[2].tokens
    decoder = engine.decoder()
    cache = cache_for(decoder, capacity=256)
    step = stepper_of(decoder, cache)
    assert isinstance(step, FusedStep)
    logits = decoder.prefill(torch.tensor(prompt, device="cuda"), cache)[None]
    tokens = []
    for _ in range(40):
        tokens.append(int(logits.argmax()))
        logits = step(torch.tensor(tokens[-1:], device="cuda"), cache)
    assert captured[0].tokens[0] == tuple(tokens)


@pytest.mark.gpu
def test_nan_in_a_weight_makes_all_logits_nan() -> None:
    decoder = _decoder("llama")
    decoder.weights.layers[1].down[3, 5] = float("nan")
    assert _logits(decoder, fused=True)[1:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ENGINE_FAMILIES)
def test_only_supported_decoders_are_fused(family: str) -> None:
    decoder = _decoder(family)
    cache = cache_for(decoder)
    assert (fused_step_obstacle(decoder, cache) is None) is (family in FUSED)
    assert (
        fused_step_obstacle(decoder, cache_for(decoder, batch_size=2))
        == "there is more than one sequence"
    )
    assert "bfloat16" in (fused_step_obstacle(_decoder(family, torch.float32), cache) or "")


@pytest.mark.gpu
def test_rules_with_vectors_take_the_general_path() -> None:
    decoder = _decoder("llama")
    name = "model.layers.0.mlp.down_proj"
    decoder.set_rules({name: MaskRule(threshold=0.1, score_scale=torch.ones(176))})
    cache = cache_for(decoder)
    assert "score_scale or shift" in (fused_step_obstacle(decoder, cache) or "")
    assert stepper_of(decoder, cache) == decoder.step


def test_cpu_takes_the_general_path_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    decoder = decoder_of(_model("llama"))
    with caplog.at_level("INFO"):
        assert stepper_of(decoder, cache_for(decoder)) == decoder.step
    assert "the weights are not on a GPU" in caplog.text
