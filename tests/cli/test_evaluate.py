import json
import shutil

import pytest

from tests.cli.conftest import MODEL, WINDOW


@pytest.fixture
def evaluate(teal, workspace):
    """Evaluate on the held-out text with further options."""

    def run(*options, model=MODEL, text="held-out.txt"):
        return teal(
            "evaluate", model, "--text", workspace / text, "--sequence-length", WINDOW,
            "--max-tokens", "256", *options,
        )  # fmt: skip

    return run


def test_json_holds_the_documented_figures(evaluate, workspace):
    result = evaluate("--plan", workspace / "plan", "--json").json
    assert set(result) == {"dense", "sparse", "tokens", "sparse_from", "sequence_length"}
    assert {"nll", "perplexity"} <= set(result["dense"])
    figures = {"nll", "perplexity", "effective_sparsity", "kl", "top1_agreement"}
    assert figures <= set(result["sparse"])
    assert result["tokens"] == 4 * 31
    assert result["sparse"]["effective_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert result["sparse"]["perplexity"] > result["dense"]["perplexity"]


def test_table_shows_the_figures_of_the_json(evaluate, workspace):
    figures = evaluate("--plan", workspace / "plan", "--json").json
    table = evaluate("--plan", workspace / "plan").out
    assert f"{figures['sparse']['perplexity']:.3f}" in table
    assert f"{figures['sparse']['kl']:.4f}" in table


def test_without_a_plan_every_token_is_scored(evaluate):
    result = evaluate("--json").json
    assert "sparse" not in result
    assert (result["tokens"], result["sparse_from"]) == (4 * 63, 0.0)


def test_calibration_text_is_refused_unless_insisted(evaluate, workspace):
    plan = ("--plan", workspace / "plan")
    assert evaluate(*plan, text="calibration.txt").is_error("overlaps", "--allow-overlap")
    assert evaluate(*plan, "--allow-overlap", text="calibration.txt").code == 0


def test_a_plan_of_another_model_is_refused_by_its_first_mismatch(evaluate, workspace, tmp_path):
    shutil.copytree(workspace / "plan", tmp_path / "plan")
    path = tmp_path / "plan/plan.json"
    content = json.loads(path.read_text())
    content["model"]["shapes"]["model.layers.0.self_attn.k_proj"] = [384, 384]
    path.write_text(json.dumps(content))
    outcome = evaluate("--plan", tmp_path / "plan")
    assert outcome.is_error("another model", "layers.0.self_attn.k_proj", "384→384", "384→128")


def test_a_newer_schema_is_refused(evaluate, workspace, tmp_path):
    shutil.copytree(workspace / "plan", tmp_path / "plan")
    path = tmp_path / "plan/plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert evaluate("--plan", tmp_path / "plan").is_error("99", "Update teal")


def test_damaged_tensors_are_refused(evaluate, workspace, tmp_path):
    shutil.copytree(workspace / "plan", tmp_path / "plan")
    tensors = tmp_path / "plan/plan.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert evaluate("--plan", tmp_path / "plan").is_error("damaged")


@pytest.mark.parametrize("sparse_from", ["1.0", "-1", "2", "nan"])
def test_a_share_that_scores_nothing_is_refused(evaluate, workspace, sparse_from):
    outcome = evaluate("--plan", workspace / "plan", "--sparse-from", sparse_from)
    assert outcome.is_error("sparse_from")
