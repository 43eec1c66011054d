import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import MODEL, WINDOW, Outcome, Teal


@pytest.fixture
def evaluate(teal: Teal, workspace: Path) -> Teal:
    """Evaluate on the held-out text with further options."""

    def run(*options, model: Any = MODEL, text: str = "held-out.txt") -> Outcome:
        return teal(
            "evaluate", model, "--text", workspace / text, "--sequence-length", WINDOW,
            "--max-tokens", "256", *options,
        )  # fmt: skip

    return run


def test_json_holds_the_documented_figures(evaluate: Teal, workspace: Path) -> None:
    result = evaluate("--plan", workspace / "plan", "--json").json
    assert set(result) == {"dense", "sparse", "tokens", "sparse_from", "sequence_length"}
    assert {"nll", "perplexity"} <= set(result["dense"])
    figures = {"nll", "perplexity", "effective_sparsity", "kl", "top1_agreement"}
    assert figures <= set(result["sparse"])
    assert result["tokens"] == 4 * 31
    assert result["sparse"]["effective_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert result["sparse"]["perplexity"] > result["dense"]["perplexity"]


def test_table_shows_the_figures_of_the_json(evaluate: Teal, workspace: Path) -> None:
    figures = evaluate("--plan", workspace / "plan", "--json").json
    table = evaluate("--plan", workspace / "plan").out
    assert f"{figures['sparse']['perplexity']:.3f}" in table
    assert f"{figures['sparse']['kl']:.4f}" in table


def test_without_a_plan_every_token_is_scored(evaluate: Teal) -> None:
    result = evaluate("--json").json
    assert "sparse" not in result
    assert (result["tokens"], result["sparse_from"]) == (4 * 63, 0.0)


def test_formats_and_sparsities_make_a_table(evaluate: Teal, workspace: Path) -> None:
    options = ("--plan", workspace / "plan", "--sparsity", "0.25,0.5", "--quantize-head")
    formats = ("--quantize", "none", "--quantize", "int8", "--quantize", "int4")
    result = evaluate(*options, *formats, "--group-size", 32, "--json").json
    shown = [
        (row["weight_format"], row["head_format"], row["target_sparsity"]) for row in result["rows"]
    ]
    assert shown == [
        ("float", "float", 0.25),
        ("float", "float", 0.5),
        *[("int8", "int8", sparsity) for sparsity in (0.0, 0.25, 0.5)],
        *[("int4", "int8", sparsity) for sparsity in (0.0, 0.25, 0.5)],
    ]
    assert result["tokens"] == 4 * 31
    assert (result["model"], result["dtype"]) == (MODEL, "bfloat16")
    assert result["text"]["source"].endswith("held-out.txt")
    table = evaluate(*options, *formats, "--group-size", 32).out
    assert "int4/32" in table
    assert "uniform (float)" in table
    assert f"{result['rows'][-1]['perplexity']:.3f}" in table


def test_a_plan_for_another_format_is_told_of_in_one_line(
    evaluate: Teal, workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluate("--plan", workspace / "plan", "--quantize", "int8").code == 0
    (line,) = caplog.messages
    assert "calibrated with float weights, the model has int8 ones" in line


def test_a_quantized_folder_is_scored_as_the_model_that_was_rounded(
    teal: Teal, evaluate: Teal, tmp_path: Path
) -> None:
    assert teal("quantize", MODEL, "--format", "int8", "--out", tmp_path / "q").code == 0
    folder = evaluate("--json", model=tmp_path / "q").json
    (rounded,) = evaluate("--quantize", "int8", "--json").json["rows"]
    assert folder["dense"]["perplexity"] == rounded["perplexity"]
    outcome = evaluate("--quantize", "int4", model=tmp_path / "q")
    assert outcome.is_error("quantized already")


def test_calibration_text_is_refused_unless_insisted(evaluate: Teal, workspace: Path) -> None:
    plan = ("--plan", workspace / "plan")
    assert evaluate(*plan, text="calibration.txt").is_error("overlaps", "--allow-overlap")
    assert evaluate(*plan, "--allow-overlap", text="calibration.txt").code == 0


def test_a_plan_of_another_model_is_refused_by_its_first_mismatch(
    evaluate: Teal, workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace / "plan", tmp_path / "plan")
    path = tmp_path / "plan/plan.json"
    content = json.loads(path.read_text())
    content["model"]["shapes"]["model.layers.0.self_attn.k_proj"] = [384, 384]
    path.write_text(json.dumps(content))
    outcome = evaluate("--plan", tmp_path / "plan")
    assert outcome.is_error("another model", "layers.0.self_attn.k_proj", "384→384", "384→128")


def test_a_newer_schema_is_refused(evaluate: Teal, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "plan", tmp_path / "plan")
    path = tmp_path / "plan/plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert evaluate("--plan", tmp_path / "plan").is_error("99", "Update teal")


def test_damaged_tensors_are_refused(evaluate: Teal, workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "plan", tmp_path / "plan")
    tensors = tmp_path / "plan/plan.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert evaluate("--plan", tmp_path / "plan").is_error("damaged")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--quantize", "int3"], ["Unknown format 'int3'"], id="format"),
        pytest.param(["--group-size", "64"], ["Give --quantize int4"], id="no groups"),
        pytest.param(["--sparsity", "0.5"], ["Give --plan"], id="no plan"),
    ],
)
def test_bad_input_is_one_line(evaluate: Teal, options: list[str], words: list[str]) -> None:
    assert evaluate(*options).is_error(*words)


@pytest.mark.parametrize("sparse_from", ["1.0", "-1", "2", "nan"])
def test_a_share_that_scores_nothing_is_refused(
    evaluate: Teal, workspace: Path, sparse_from: str
) -> None:
    outcome = evaluate("--plan", workspace / "plan", "--sparse-from", sparse_from)
    assert outcome.is_error("sparse_from")
