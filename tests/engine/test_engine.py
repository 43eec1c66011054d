import gc
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import teal
from teal.engine.engine import Engine, Prompts
from teal.foundation.errors import UserError
from teal.sparsification import densify, sparsify
from tests.helpers import plan_for, tiny_model, tiny_tokens

MODEL = Path(__file__).parents[2] / "models/py-16m"
PROMPT = tiny_tokens(1, 9)[0].tolist()
# About half of the activations of a tiny model are smaller.
THRESHOLD = 0.4


@pytest.fixture
def model(device: torch.device) -> Any:
    return tiny_model("llama").to(device)


@pytest.fixture
def engine(model: Any) -> Engine:
    return Engine(model)


@pytest.fixture(scope="module")
def written() -> tuple[Engine, list[int]]:
    """An engine of the trained model, which has a tokenizer, and a prompt for it."""
    tokenizer = teal.load_tokenizer(str(MODEL))
    return Engine(MODEL, dtype="float32"), tokenizer("def read_json(path):")["input_ids"]


def by_transformers(model: Any, prompt: Sequence[int], number: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, max_new_tokens=number, do_sample=False, eos_token_id=None)
    return tuple(output[0, len(prompt) :].tolist())


def generated(
    engine: Engine, prompts: Prompts = PROMPT, number: int = 20, **options: Any
) -> tuple[tuple[int, ...], ...]:
    """Return the new token ids of prompts that no token ends."""
    return engine.generate(prompts, max_new_tokens=number, stop_tokens=(), **options).tokens


def test_greedy_tokens_equal_those_of_transformers(model: Any) -> None:
    expected = by_transformers(model, PROMPT, 20)
    assert generated(Engine(model)) == (expected,)


def test_sparse_tokens_equal_those_of_a_sparse_model_in_transformers(model: Any) -> None:
    plan = plan_for(model, THRESHOLD)
    dense = by_transformers(model, PROMPT, 20)
    sparse = by_transformers(sparsify(model, plan), PROMPT, 20)
    densify(model)
    assert generated(Engine(model, plan)) == (sparse,)
    assert sparse != dense


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_prompts_of_a_batch_continue_as_each_alone(engine: Engine, options: dict[str, Any]) -> None:
    prompts = [tiny_tokens(1, 3 + row, seed=row)[0].tolist() for row in range(8)]
    together = generated(engine, prompts, **options)
    alone = [
        generated(engine, prompt, **options, seed=row)[0] for row, prompt in enumerate(prompts)
    ]
    assert list(together) == alone


def test_prompts_may_be_lists_or_tensors(engine: Engine) -> None:
    expected = generated(engine)
    for prompts in ([PROMPT], torch.tensor(PROMPT), torch.tensor([PROMPT]), [torch.tensor(PROMPT)]):
        assert generated(engine, prompts) == expected


def test_longer_call_after_a_short_one_begins_with_the_same_tokens(engine: Engine) -> None:
    short = generated(engine, number=5)
    assert generated(engine, number=100)[0][:5] == short[0]
    assert generated(engine, number=5) == short


def test_sparsity_can_be_changed_for_one_call(model: Any) -> None:
    plan = plan_for(model, THRESHOLD)
    engine, dense = Engine(model, plan), generated(Engine(model))
    sparse = generated(engine)
    assert generated(engine, sparsity=0.0) == dense != sparse
    assert generated(engine, sparsity=0.5) == generated(engine, sparsity=None) == sparse


def test_evicted_decoder_is_made_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.engine.engine._DECODERS", 1)
    engine = Engine(model, plan_for(model, THRESHOLD))
    sparse = generated(engine)
    generated(engine, sparsity=0.0)
    assert generated(engine) == sparse


def test_end_tokens_of_the_model_end_a_sequence(model: Any) -> None:
    free = by_transformers(model, PROMPT, 20)
    model.generation_config.eos_token_id = [free[4], 1]
    result = Engine(model).generate(PROMPT, max_new_tokens=20)
    assert result.finish_reasons == ("stop",)
    assert result.tokens[0] == free[: free.index(free[4]) + 1]


def test_logprobs_equal_those_of_the_model(model: Any) -> None:
    result = Engine(model).generate(PROMPT, max_new_tokens=5, stop_tokens=(), logprobs=True)
    ids = torch.tensor([[*PROMPT, *result.tokens[0]]], device=model.device)
    with torch.no_grad():
        expected = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1).amax(-1)
    assert result.logprobs[0] == pytest.approx(expected.tolist(), abs=1e-4)


def test_texts_are_those_of_the_tokenizer(written: tuple[Engine, list[int]]) -> None:
    engine, prompt = written
    result = engine.generate(prompt, max_new_tokens=40)
    assert result.texts == (engine.tokenizer.decode(result.tokens[0]),)
    assert result.decode_seconds > 0


def test_stop_string_ends_the_text_before_it(written: tuple[Engine, list[int]]) -> None:
    engine, prompt = written
    whole = engine.generate(prompt, max_new_tokens=60)
    stop = whole.texts[0][30:37]
    result = engine.generate(prompt, max_new_tokens=60, stop=[stop])
    assert result.texts[0] == whole.texts[0][: whole.texts[0].index(stop)]
    assert result.finish_reasons == ("stop",)
    assert len(result.tokens[0]) < 60


def test_stream_yields_what_generate_returns(written: tuple[Engine, list[int]]) -> None:
    engine, prompt = written
    whole = engine.generate([prompt, prompt[:3]], max_new_tokens=12, temperature=0.8)
    tokens = list(engine.stream([prompt, prompt[:3]], max_new_tokens=12, temperature=0.8))
    for index in range(2):
        mine = [token for token in tokens if token.sequence == index]
        assert tuple(token.id for token in mine) == whole.tokens[index]
        assert "".join(token.text for token in mine) == whole.texts[index]


def test_busy_engine_refuses_calls_until_its_stream_is_closed(engine: Engine) -> None:
    expected = generated(engine)
    tokens = engine.stream(PROMPT, max_new_tokens=20, stop_tokens=())
    next(tokens)
    with pytest.raises(UserError, match=r"already decoding.*close its stream"):
        engine.generate(PROMPT)
    tokens.close()  # type: ignore[attr-defined]
    assert generated(engine) == expected


def test_stream_that_was_never_started_blocks_no_call(engine: Engine) -> None:
    tokens = engine.stream(PROMPT)
    generated(engine)
    del tokens


def test_engine_is_freed_with_its_last_reference(model: Any) -> None:
    engine = Engine(model)
    generated(engine, number=3)
    gone = weakref.ref(engine._runner)
    gc.collect()
    gc.disable()
    try:
        del engine
    finally:
        gc.enable()
    assert gone() is None


def test_streaming_leaves_the_grad_mode_of_the_caller_alone(engine: Engine) -> None:
    for _ in engine.stream(PROMPT, max_new_tokens=3):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_nan_in_prefill_names_the_layer_and_gives_no_token(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    with pytest.raises(UserError, match=r"NaN or infinity; model\.layers\.1 is the first"):
        Engine(model).generate(PROMPT)


def test_nan_in_a_step_is_an_error_after_the_earlier_tokens(model: Any) -> None:
    expected = by_transformers(model, PROMPT, 20)
    # This token is not in the prompt, and the first step reads it.
    assert expected[0] not in PROMPT
    model.get_input_embeddings().weight.data[expected[0]] = math.inf
    tokens = Engine(model).stream(PROMPT, max_new_tokens=20, stop_tokens=())
    assert next(tokens).id == expected[0]
    with pytest.raises(UserError, match="the embedding is the first"):
        next(tokens)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        pytest.param([], {}, "prompt is empty", id="no token"),
        pytest.param([[3], []], {}, "prompt is empty", id="one empty"),
        pytest.param([[3]] * 9, {}, "9 prompts were given. Give 1 to 8", id="too many"),
        pytest.param([3] * 100, {"max_new_tokens": 29}, "context of 128", id="too long"),
        pytest.param([97], {}, "token id 97", id="outside the vocabulary"),
        pytest.param([3], {"max_new_tokens": 0}, "below 1", id="no new token"),
        pytest.param([3], {"temperature": -1.0}, "temperature", id="temperature"),
        pytest.param([3], {"stop": "x"}, "need a tokenizer", id="stop without tokenizer"),
        pytest.param([3], {"sparsity": 0.5}, "has no plan", id="sparsity without plan"),
        pytest.param(torch.ones(2), {}, "float32", id="floats"),
        pytest.param(torch.ones(1, 1, 1).long(), {}, r"shape \(1, 1, 1\)", id="dimensions"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    engine: Engine, prompts: Prompts, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        engine.generate(prompts, **options)


def test_tuning_reaches_the_decoders(model: Any, tmp_path: Path) -> None:
    (tmp_path / "triton_tile_configs.json").touch()
    assert Engine(model, tuning=tmp_path).decoder().tuning == str(tmp_path)
    assert Engine(model).decoder().tuning == ""


def test_a_tuning_folder_without_a_table_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no table"):
        Engine(model, tuning=tmp_path)


def test_plan_of_another_model_is_refused(model: Any) -> None:
    other = plan_for(tiny_model("llama", intermediate_size=32), THRESHOLD)
    with pytest.raises(UserError, match="belongs to another model"):
        Engine(model, other)


def test_capacity_is_a_limit(model: Any) -> None:
    engine = Engine(model, capacity=16)
    assert len(generated(engine, number=7)[0]) == 7
    with pytest.raises(UserError, match="capacity of 16"):
        generated(engine, number=8)
    with pytest.raises(UserError, match="Give 1 to 128"):
        Engine(model, capacity=129)


@pytest.mark.gpu
def test_decoding_on_a_gpu_waits_for_nothing_but_the_tokens() -> None:
    engine = Engine(tiny_model("llama").cuda())
    expected = generated(engine)
    tokens = engine.stream(PROMPT, max_new_tokens=20, stop_tokens=())
    # The prefill may wait.
    first = next(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = [token.id for token in tokens]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (first.id, *rest) == expected[0]
