import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import MODEL, Teal

PROMPT = "import os\n\ndef read_json(path):"
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture
def generate(teal: Teal) -> Teal:
    """Continue the prompt with further options."""
    return lambda *options: teal("generate", MODEL, "--prompt", PROMPT, *options)


def test_continuation_is_that_of_transformers(generate: Teal) -> None:
    outcome = generate("--max-new-tokens", "12")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert outcome.code == 0
    assert outcome.out.strip() == expected.strip()


def test_speed_is_told_apart_from_the_text(generate: Teal) -> None:
    outcome = generate("--max-new-tokens", "4")
    assert outcome.err.startswith("4 tokens, ")
    assert "tokens/s" in outcome.err
    assert "tokens/s" not in outcome.out


def test_a_plan_changes_the_continuation_but_not_the_prompt(
    teal: Teal, generate: Teal, workspace: Path, tmp_path: Path
) -> None:
    assert (
        teal("allocate", workspace / "stats", "--sparsity", "0.8", "--out", tmp_path / "p").code
        == 0
    )
    dense = generate("--max-new-tokens", "24")
    sparse = generate("--max-new-tokens", "24", "--plan", tmp_path / "p")
    assert sparse.out != dense.out
    assert sparse.out.startswith(PROMPT)
    back = generate("--max-new-tokens", "24", "--plan", tmp_path / "p", "--sparsity", "0")
    assert back.out == dense.out


def test_a_seed_makes_samples_repeatable(generate: Teal) -> None:
    options = ("--temperature", "1", "--max-new-tokens", 8)
    first, again, other = (generate(*options, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_options_reach_the_engine(generate: Teal) -> None:
    greedy = generate("--max-new-tokens", 24).out
    for options in (["--top-k", 1], ["--top-p", 0.0001], ["--min-p", 1]):
        assert generate("--max-new-tokens", 24, "--temperature", 2, *options).out == greedy
    assert generate("--max-new-tokens", 24, "--repetition-penalty", 1.5).out != greedy


def test_text_ends_before_a_stop_string(generate: Teal) -> None:
    whole = generate("--max-new-tokens", 40).out
    stop = whole[len(PROMPT) + 20 : len(PROMPT) + 26]
    outcome = generate("--max-new-tokens", 40, "--stop", stop)
    begun = len(PROMPT) + whole[len(PROMPT) :].index(stop)
    assert outcome.out.removesuffix("\n") == whole[:begun]


def test_several_prompts_are_several_sequences(generate: Teal) -> None:
    content = generate("--prompt", "class A:", "--max-new-tokens", 6, "--json").json
    assert [sequence["prompt"] for sequence in content["sequences"]] == [PROMPT, "class A:"]
    assert all(len(sequence["tokens"]) == 6 for sequence in content["sequences"])
    assert content["sequences"][0]["finish_reason"] == "length"
    assert content["tokens_per_second"] > 0
    table = generate("--prompt", "class A:", "--max-new-tokens", 6).out
    for sequence in content["sequences"]:
        assert sequence["prompt"] + sequence["text"] in table


def test_quantized_weights_continue_the_prompt_in_their_own_way(generate: Teal) -> None:
    dense = generate("--max-new-tokens", 40)
    quantized = generate("--max-new-tokens", 40, "--quantize", "int4", "--quantize-head")
    assert quantized.code == 0
    assert quantized.out.startswith(PROMPT)
    assert quantized.out != dense.out


def test_a_quantized_folder_is_continued_as_its_rounded_model(
    teal: Teal, generate: Teal, tmp_path: Path
) -> None:
    assert teal("quantize", MODEL, "--format", "int8", "--out", tmp_path / "q").code == 0
    options = ("--prompt", PROMPT, "--max-new-tokens", 24)
    folder = teal("generate", tmp_path / "q", *options)
    assert folder.code == 0
    assert folder.out == generate("--max-new-tokens", 24, "--quantize", "int8").out
    again = teal("generate", tmp_path / "q", *options, "--quantize", "int4")
    assert again.is_error("is quantized already", "Open it without")


def test_chat_puts_the_prompt_into_the_template(teal: Teal, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config))
    options = ("--max-new-tokens", "12", "--json")
    chat = teal("generate", tmp_path / "model", "--prompt", "Hello", "--chat", *options)
    plain = teal("generate", MODEL, "--prompt", "<user>Hello", *options)
    assert chat.json["sequences"][0]["text"] == plain.json["sequences"][0]["text"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--prompt", ""], ["prompt is empty"], id="empty"),
        pytest.param(
            ["--prompt", "x", "--max-new-tokens", "5000"], ["context of 1024"], id="too long"
        ),
        pytest.param(["--prompt", "x", "--plan", "nope"], ["'nope'", "plan.json"], id="no plan"),
        pytest.param(
            ["--prompt", "x", "--quantize", "int3"], ["Unknown format 'int3'"], id="format"
        ),
        pytest.param(
            ["--prompt", "x", "--group-size", 64], ["Give --quantize int4"], id="no groups"
        ),
        pytest.param(["--prompt", "x", "--chat"], ["no chat template"], id="no chat template"),
        pytest.param(["--prompt", "x"] * 9, ["9 prompts", "1 to 8"], id="too many"),
        pytest.param(["--prompt", "x", "--top-p", "0"], ["top_p 0.0 is out of range"], id="top-p"),
        pytest.param(["--prompt", "x", "--sparsity", "0.5"], ["has no plan"], id="sparsity"),
        pytest.param(
            ["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens 0"], id="no token"
        ),
    ],
)
def test_bad_input_is_one_line(teal: Teal, options: list[str], words: list[str]) -> None:
    assert teal("generate", MODEL, *options).is_error(*words)
