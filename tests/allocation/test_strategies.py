import pytest

from teal.allocation import (
    STRATEGIES,
    GreedySettings,
    allocate,
    register_strategy,
    strategy_named,
)
from teal.calibration import CalibrationStats, calibrate
from teal.data import TokenWindows
from teal.foundation.errors import UserError
from tests.helpers import tiny_model, tiny_tokens

SETTINGS = GreedySettings(step=0.1, until=0.6)


@pytest.fixture
def prepared():
    model = tiny_model("llama")
    stats = calibrate(model, tiny_tokens(2, 24))
    return model, stats, TokenWindows(tiny_tokens(2, 24, seed=1), stats.text)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_every_strategy_meets_the_budget(prepared, strategy, sparsity):
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


def test_one_greedy_run_serves_every_target_also_from_disk(prepared, tmp_path):
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


def test_the_same_search_is_not_run_twice(prepared):
    model, stats, windows = prepared
    request = {"strategy": "greedy", "model": model, "tokens": windows}
    allocate(stats, sparsity=0.3, settings=SETTINGS, **request)
    path = stats.paths["greedy"]
    allocate(stats, sparsity=0.4, settings=SETTINGS, **request)
    assert stats.paths["greedy"] is path
    allocate(stats, sparsity=0.4, settings=GreedySettings(step=0.05, until=0.6), **request)
    assert stats.paths["greedy"] is not path


def test_greedy_without_path_or_model_says_what_to_give(prepared):
    _, stats, _ = prepared
    with pytest.raises(UserError, match="--model"):
        allocate(stats, sparsity=0.5, strategy="greedy")


def test_a_path_of_other_target_modules_is_refused(prepared):
    model, stats, windows = prepared
    allocate(stats, sparsity=0.3, strategy="greedy", model=model, tokens=windows, settings=SETTINGS)
    with pytest.raises(UserError, match="target modules"):
        allocate(stats, sparsity=0.3, strategy="greedy", target_modules=["down_proj"])


def test_an_unknown_strategy_names_the_closest_and_all(prepared):
    _, stats, _ = prepared
    with pytest.raises(UserError, match=r"Did you mean 'greedy'\? Known: greedy, uniform"):
        allocate(stats, sparsity=0.5, strategy="gredy")


def test_an_unknown_method_names_all(prepared):
    _, stats, _ = prepared
    with pytest.raises(UserError, match="Known: teal"):
        allocate(stats, sparsity=0.5, method="tael")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), "0.5"])
def test_a_sparsity_out_of_range_is_refused(prepared, sparsity):
    _, stats, _ = prepared
    with pytest.raises(UserError, match="outside"):
        allocate(stats, sparsity=sparsity)


def test_a_registered_strategy_is_found_and_its_name_taken(prepared, monkeypatch):
    _, stats, _ = prepared
    monkeypatch.setattr("teal.allocation.strategies.STRATEGIES", dict(STRATEGIES))
    register_strategy("first", lambda request: {next(iter(request.stats.model.shapes)): 0.5})
    plan = allocate(stats, sparsity=0.5, strategy="first")
    assert list(plan.projections) == ["model.layers.0.self_attn.q_proj"]
    assert strategy_named("first")
    with pytest.raises(ValueError, match="already"):
        register_strategy("first", lambda request: {})
