import shutil
from pathlib import Path

import pytest

from teal.plan import SparsityPlan
from tests.cli.conftest import MODEL, WINDOW, Teal

COARSE = ("--greedy-step", "0.02", "--greedy-until", "0.04", "--tokens", "64")


@pytest.fixture
def stats(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the statistics, to which a path may be added."""
    shutil.copytree(workspace / "stats", tmp_path / "stats")
    return tmp_path / "stats"


def test_the_plan_meets_its_target(workspace: Path) -> None:
    plan = SparsityPlan.load(workspace / "plan")
    assert plan.sparsity_budget == pytest.approx(0.5)
    assert (plan.method, plan.strategy) == ("teal", "uniform")


def test_a_greedy_path_is_kept_for_later_plans(
    teal: Teal, workspace: Path, stats: Path, tmp_path: Path
) -> None:
    outcome = teal(
        "allocate", stats, "--sparsity", "0.04", "--strategy", "greedy", "--model", MODEL,
        "--text", workspace / "calibration.txt", "--sequence-length", WINDOW,
        "--out", tmp_path / "plan", *COARSE,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    later = teal(
        "allocate", stats, "--sparsity", "0.03", "--strategy", "greedy", "--out", tmp_path / "later"
    )
    assert later.code == 0, later.err
    assert SparsityPlan.load(tmp_path / "later").sparsity_budget == pytest.approx(0.03)
    beyond = teal(
        "allocate", stats, "--sparsity", "0.5", "--strategy", "greedy", "--out", tmp_path / "beyond"
    )
    assert beyond.is_error("path ends at", "--greedy-until")


def test_statistics_of_quantized_weights_need_a_model_with_the_same(
    teal: Teal, workspace: Path, tmp_path: Path
) -> None:
    text = ("--text", workspace / "calibration.txt", "--sequence-length", WINDOW)
    few = ("--tokens", 256, "--quantize", "int8", "--out", tmp_path / "stats")
    assert teal("calibrate", MODEL, *text, *few).code == 0
    options = ("--sparsity", "0.04", "--strategy", "greedy", "--model", MODEL, *text, *COARSE)
    allocate = ("allocate", tmp_path / "stats", *options, "--out", tmp_path / "plan")
    assert teal(*allocate).is_error("int8 weights, the model has float", "Give --quantize int8")
    assert teal(*allocate, "--quantize", "int8").code == 0
    assert SparsityPlan.load(tmp_path / "plan").weight_format == "int8"


def test_the_highest_sparsity_within_a_perplexity_bound_is_found(
    teal: Teal, workspace: Path, stats: Path, tmp_path: Path
) -> None:
    outcome = teal(
        "allocate", stats, "--max-perplexity-increase", "0.05", "--model", MODEL,
        "--text", workspace / "held-out.txt", "--sequence-length", WINDOW, "--tokens", "256",
        "--out", tmp_path / "plan",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    within = [line for line in outcome.out.splitlines() if line.endswith(", within")]
    plan = SparsityPlan.load(tmp_path / "plan")
    best = max(float(line.split()[1]) for line in within) / 100
    assert plan.target_sparsity == pytest.approx(best, abs=1e-3)
    assert 0.1 < plan.target_sparsity < 0.6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--sparsity", "1.0"], ["outside [0, 1)"], id="sparsity one"),
        pytest.param(["--sparsity", "-0.1"], ["outside [0, 1)"], id="negative sparsity"),
        pytest.param(["--sparsity", "nan"], ["outside [0, 1)"], id="NaN"),
        pytest.param([], ["exactly one of"], id="no target"),
        pytest.param(
            ["--sparsity", "0.5", "--max-perplexity-increase", "0.1"], ["exactly one"], id="both"
        ),
        pytest.param(
            ["--sparsity", "0.5", "--strategy", "gredy"], ["'greedy'?", "uniform"], id="strategy"
        ),
        pytest.param(["--sparsity", "0.5", "--method", "tael"], ["'teal'?"], id="method"),
        pytest.param(
            ["--sparsity", "0.5", "--target-modules", "expert"], ["'expert'", "q_proj"], id="module"
        ),
        pytest.param(
            ["--sparsity", "0.5", "--strategy", "greedy"], ["--model", "--text"], id="no path"
        ),
        pytest.param(["--sparsity", "0.5", "--model", MODEL], ["belong together"], id="no text"),
        pytest.param(["--max-perplexity-increase", "0.1"], ["needs --model"], id="search"),
        pytest.param(
            ["--sparsity", "0.5", "--greedy-step", "2"], ["step", "outside"], id="step too large"
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    teal: Teal, workspace: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    outcome = teal("allocate", workspace / "stats", "--out", tmp_path / "plan", *options)
    assert outcome.is_error(*words)
    assert not (tmp_path / "plan").exists()


def test_search_refuses_the_calibration_text(teal: Teal, workspace: Path, tmp_path: Path) -> None:
    outcome = teal(
        "allocate", workspace / "stats", "--max-perplexity-increase", "0.05", "--model", MODEL,
        "--text", workspace / "calibration.txt", "--sequence-length", WINDOW, "--tokens", "256",
        "--out", tmp_path / "plan",
    )  # fmt: skip
    assert outcome.is_error("overlaps")


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "plan"}'], ids=["cut", "list", "plan"])
def test_damaged_statistics_are_refused(
    teal: Teal, stats: Path, tmp_path: Path, damage: str
) -> None:
    (stats / "stats.json").write_text(damage)
    assert teal("allocate", stats, "--sparsity", "0.5", "--out", tmp_path / "plan").is_error("anew")
