import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import MODEL

PROMPT = "import os\n\ndef read_json(path):"


def test_continuation_is_that_of_transformers(teal):
    outcome = teal("generate", MODEL, "--prompt", PROMPT, "--max-new-tokens", "12")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    assert outcome.code == 0
    assert outcome.out.strip() == expected.strip()


def test_speed_is_told_apart_from_the_text(teal):
    outcome = teal("generate", MODEL, "--prompt", PROMPT, "--max-new-tokens", "4")
    assert "tokens/s" in outcome.err
    assert "tokens/s" not in outcome.out


def test_a_plan_changes_the_continuation_but_not_the_prompt(teal, workspace, tmp_path):
    assert (
        teal("allocate", workspace / "stats", "--sparsity", "0.8", "--out", tmp_path / "p").code
        == 0
    )
    arguments = ("generate", MODEL, "--prompt", PROMPT, "--max-new-tokens", "24")
    sparse, dense = teal(*arguments, "--plan", tmp_path / "p"), teal(*arguments)
    assert sparse.out != dense.out
    assert sparse.out.startswith(PROMPT)


def test_a_seed_makes_samples_repeatable(teal):
    arguments = ("generate", MODEL, "--prompt", PROMPT, "--temperature", "1", "--max-new-tokens", 8)
    first, again, other = (teal(*arguments, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--prompt", ""], ["prompt is empty"], id="empty"),
        pytest.param(
            ["--prompt", "x", "--max-new-tokens", "5000"], ["context of 1024"], id="too long"
        ),
        pytest.param(["--prompt", "x", "--plan", "nope"], ["'nope'", "plan.json"], id="no plan"),
    ],
)
def test_bad_input_is_one_line(teal, options, words):
    assert teal("generate", MODEL, *options).is_error(*words)
