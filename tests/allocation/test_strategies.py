from pathlib import Path
from typing import Any

import pytest
import torch

from teal.allocation import (
    STRATEGIES,
    GreedySettings,
    allocate,
    greedy_path,
    register_strategy,
    strategy_named,
)
from teal.calibration import CalibrationStats, calibrate
from teal.calibration.histogram import Histogram
from teal.cli.stdlib_text import calibration_text, held_out_text
from teal.data import TokenWindows, token_windows
from teal.evaluation import compare
from teal.evaluation.scores import SparseScore
from teal.foundation.errors import UserError
from teal.models.loading import load_model, load_tokenizer
from teal.plan import SparsityPlan
from tests.helpers import TOLERANCES, tiny_model, tiny_tokens

TRAINED = str(Path(__file__).parents[2] / "models/py-16m")
SETTINGS = GreedySettings(step=0.1, until=0.6)
# A step of 0.1 is too coarse for the smallest projections to carry a share of the highest budgets.
FINE = GreedySettings(step=0.02, until=0.6)

Prepared = tuple[Any, CalibrationStats, TokenWindows]


@pytest.fixture
def prepared() -> Prepared:
    model = tiny_model("llama")
    stats = calibrate(model, tiny_tokens(2, 24))
    return model, stats, TokenWindows(tiny_tokens(2, 24, seed=1), stats.text)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_every_strategy_meets_the_budget(
    prepared: Prepared, strategy: str, sparsity: float
) -> None:
    model, stats, windows = prepared
    plan = allocate(
        stats,
        sparsity=sparsity,
        strategy=strategy,
        model=model,
        tokens=windows,
        settings=SETTINGS,
    )
    assert plan.sparsity_budget == pytest.approx(sparsity)
    assert (plan.strategy, plan.target_sparsity) == (strategy, sparsity)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_path_of_every_strategy_meets_every_budget(prepared: Prepared, strategy: str) -> None:
    model, stats, windows = prepared
    plan = allocate(
        stats, sparsity=0.45, strategy=strategy, model=model, tokens=windows, settings=FINE
    )
    for sparsity in (0.003, 0.01, 0.1, 0.234, 0.45, 0.599, plan.path.end):
        assert plan.at(sparsity).sparsity_budget == pytest.approx(sparsity, abs=1e-9)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_point_of_the_path_is_the_plan_for_that_sparsity(prepared: Prepared, strategy: str) -> None:
    model, stats, windows = prepared
    request = {"strategy": strategy, "model": model, "tokens": windows, "settings": FINE}
    elsewhere = allocate(stats, sparsity=0.333, **request)
    for sparsity in (0.01, 0.25, 0.5, 0.6):
        there = allocate(stats, sparsity=sparsity, **request)
        assert rules_of(elsewhere.at(sparsity)) == rules_of(there)


@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
def test_between_points_thresholds_drop_what_is_asked_for(
    prepared: Prepared, distribution: str
) -> None:
    _, stats, _ = prepared
    generator, x = torch.Generator().manual_seed(0), torch.empty(500_000)
    draw = x.normal_ if distribution == "gauss" else x.exponential_
    draw(generator=generator)
    for entry in stats.inputs.values():
        entry.histogram = Histogram()
        entry.histogram.add(x)
    plan = allocate(stats, sparsity=0.5)
    for sparsity in (0.005, 0.015, 0.345, 0.555, 0.975):
        for name, planned in plan.at(sparsity).projections.items():
            dropped = stats.of(name).histogram.cdf(planned.rule.threshold)
            assert dropped == pytest.approx(sparsity, abs=TOLERANCES["sparsity"])


def test_uniform_path_goes_as_far_as_quantiles_are_good(prepared: Prepared) -> None:
    _, stats, _ = prepared
    assert allocate(stats, sparsity=0.5).path.end == 0.99
    assert allocate(stats, sparsity=0.995).path.end == 0.995


def test_greedy_path_of_a_plan_goes_on_beyond_its_target_to_the_end_of_the_search(
    prepared: Prepared,
) -> None:
    model, stats, windows = prepared
    plan = allocate(
        stats, sparsity=0.3, strategy="greedy", model=model, tokens=windows, settings=FINE
    )
    assert plan.path.end == pytest.approx(FINE.until)
    with pytest.raises(UserError, match=r"path ends at sparsity 0\.6"):
        plan.at(0.7)


def test_path_leaves_out_what_a_strategy_cannot_reach(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stats, _ = prepared
    monkeypatch.setattr("teal.allocation.strategies.STRATEGIES", dict(STRATEGIES))
    names = list(stats.model.shapes)
    register_strategy("doubled", lambda request: dict.fromkeys(names, 2 * request.sparsity))
    assert allocate(stats, sparsity=0.2, strategy="doubled").path.end == 0.49


def test_one_greedy_run_serves_every_target_also_from_disk(
    prepared: Prepared, tmp_path: Path
) -> None:
    model, stats, windows = prepared
    first = allocate(
        stats, sparsity=0.3, strategy="greedy", model=model, tokens=windows, settings=SETTINGS
    )
    stats.save(tmp_path / "stats")
    later = CalibrationStats.load(tmp_path / "stats")
    assert allocate(later, sparsity=0.5, strategy="greedy").sparsity_budget == pytest.approx(0.5)
    again = allocate(later, sparsity=0.3, strategy="greedy")
    for name, planned in first.projections.items():
        assert again.projections[name].target_sparsity == planned.target_sparsity
        assert (again.projections[name].rule is None) == (planned.rule is None)


def test_the_same_search_is_not_run_twice(prepared: Prepared) -> None:
    model, stats, windows = prepared
    request = {"strategy": "greedy", "model": model, "tokens": windows}
    allocate(stats, sparsity=0.3, settings=SETTINGS, **request)
    path = stats.paths["greedy"]
    allocate(stats, sparsity=0.4, settings=SETTINGS, **request)
    assert stats.paths["greedy"] is path
    allocate(stats, sparsity=0.4, settings=GreedySettings(step=0.05, until=0.6), **request)
    assert stats.paths["greedy"] is not path


def test_greedy_without_path_or_model_says_what_to_give(prepared: Prepared) -> None:
    _, stats, _ = prepared
    with pytest.raises(UserError, match="--model"):
        allocate(stats, sparsity=0.5, strategy="greedy")


def test_a_path_of_other_target_modules_is_refused(prepared: Prepared) -> None:
    model, stats, windows = prepared
    allocate(stats, sparsity=0.3, strategy="greedy", model=model, tokens=windows, settings=SETTINGS)
    with pytest.raises(UserError, match="target modules"):
        allocate(stats, sparsity=0.3, strategy="greedy", target_modules=["down_proj"])


def test_an_unknown_strategy_names_the_closest_and_all(prepared: Prepared) -> None:
    _, stats, _ = prepared
    with pytest.raises(UserError, match=r"Did you mean 'greedy'\? Known: greedy, uniform"):
        allocate(stats, sparsity=0.5, strategy="gredy")


def test_an_unknown_method_names_all(prepared: Prepared) -> None:
    _, stats, _ = prepared
    with pytest.raises(UserError, match="Known: teal"):
        allocate(stats, sparsity=0.5, method="tael")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), "0.5"])
def test_a_sparsity_out_of_range_is_refused(prepared: Prepared, sparsity: Any) -> None:
    _, stats, _ = prepared
    with pytest.raises(UserError, match="outside"):
        allocate(stats, sparsity=sparsity)


def test_a_registered_strategy_is_found_and_its_name_taken(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stats, _ = prepared
    monkeypatch.setattr("teal.allocation.strategies.STRATEGIES", dict(STRATEGIES))
    register_strategy("first", lambda request: {next(iter(request.stats.model.shapes)): 0.5})
    plan = allocate(stats, sparsity=0.5, strategy="first")
    assert list(plan.projections) == ["model.layers.0.self_attn.q_proj"]
    assert strategy_named("first")
    with pytest.raises(ValueError, match="already"):
        register_strategy("first", lambda request: {})


def rules_of(plan: SparsityPlan) -> dict[str, tuple[float, float | None]]:
    return {
        name: (planned.target_sparsity, planned.rule and planned.rule.threshold)
        for name, planned in plan.projections.items()
    }


@pytest.fixture(scope="module")
def trained() -> Prepared:
    """The model of the repository, its statistics with a greedy path, and text it never saw."""
    model, tokenizer = load_model(TRAINED), load_tokenizer(TRAINED)
    text = calibration_text()
    windows = token_windows(text, tokenizer, sequence_length=512, num_tokens=10_240)
    stats = calibrate(model, windows, batch_size=2)
    stats.paths["greedy"] = greedy_path(
        model,
        stats,
        token_windows(text, tokenizer, sequence_length=512, num_tokens=512, offset=10_240),
        settings=GreedySettings(step=0.0125, until=0.7),
    )
    held_out = token_windows(held_out_text(), tokenizer, sequence_length=512, max_tokens=10_240)
    return model, stats, held_out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["uniform", "greedy"])
def test_path_drops_on_held_out_text_what_a_plan_made_for_the_sparsity_drops(
    trained: Prepared, strategy: str
) -> None:
    model, stats, held_out = trained
    plan = allocate(stats, sparsity=0.5, strategy=strategy)
    # Not half way between points, where every second bfloat16 threshold falls onto an atom.
    sparsities = (0.2537, 0.5, 0.6042)
    made = [allocate(stats, sparsity=sparsity, strategy=strategy) for sparsity in sparsities]
    chosen = [plan.at(sparsity) for sparsity in sparsities]
    scores = compare(model, held_out.tokens[:5], [*made, *chosen]).sparse
    effective = [score.effective_sparsity for score in scores]
    assert effective[3:] == pytest.approx(effective[:3], abs=TOLERANCES["sparsity"])
    # Projections behind sparse ones receive other inputs than calibrated.
    assert effective[3:] == pytest.approx(sparsities, abs=0.03)


@pytest.fixture(scope="module")
def equally_sparse(trained: Prepared) -> dict[float, tuple[SparseScore, SparseScore]]:
    """Scores of uniform and greedy plans that drop the same share, by target sparsity."""
    model, stats, held_out = trained
    sparsities = (0.4, 0.5, 0.65)
    plans = [
        allocate(stats, sparsity=sparsity, strategy=strategy)
        for strategy in ("uniform", "greedy")
        for sparsity in sparsities
    ]
    scores = compare(model, held_out, plans).sparse
    # Projections behind sparse ones receive other inputs than calibrated: move the target of the
    # greedy plan until both drop the same share.
    matched = [
        allocate(
            stats,
            sparsity=sparsity + uniform.effective_sparsity - greedy.effective_sparsity,
            strategy="greedy",
        )
        for sparsity, uniform, greedy in zip(sparsities, scores[:3], scores[3:], strict=True)
    ]
    greedy_scores = compare(model, held_out, matched).sparse
    return dict(zip(sparsities, zip(scores[:3], greedy_scores, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.65])
def test_greedy_beats_uniform_on_held_out_text_at_equal_effective_sparsity(
    equally_sparse: dict[float, tuple[SparseScore, SparseScore]], sparsity: float
) -> None:
    uniform, greedy = equally_sparse[sparsity]
    assert greedy.effective_sparsity == pytest.approx(uniform.effective_sparsity, abs=2e-3)
    assert greedy.perplexity < uniform.perplexity
    assert greedy.kl < uniform.kl
