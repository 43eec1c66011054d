import itertools
from typing import Any

import pytest
import torch

from teal.allocation import GreedySettings, allocate, greedy_path
from teal.allocation.block_error import BlockError
from teal.allocation.greedy import sparsities_at
from teal.calibration import CalibrationStats, calibrate
from teal.calibration.allocation_path import AllocationPath
from teal.data import TokenWindows
from teal.foundation.errors import UserError
from teal.linear import TokenSelection
from teal.models.blocks import first_batches
from teal.models.families import FAMILIES, blocks_of
from teal.sparsification import insert_sparse_linears
from tests.helpers import tiny_model, tiny_tokens

STEP = 0.05

Prepared = tuple[Any, CalibrationStats, TokenWindows]


def prepare(model_type: str = "llama") -> Prepared:
    model = tiny_model(model_type)
    stats = calibrate(model, tiny_tokens(2, 24))
    windows = TokenWindows(tiny_tokens(2, 24, seed=1), stats.text)
    return model, stats, windows


@pytest.fixture(scope="module")
def llama() -> Prepared:
    return prepare()


@pytest.fixture(scope="module")
def path(llama: Prepared) -> AllocationPath:
    model, stats, windows = llama
    return greedy_path(model, stats, windows, settings=GreedySettings(step=STEP, until=0.5))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_round_of_every_block_drops_the_same_number_of_weights(model_type: str) -> None:
    model, stats, windows = prepare(model_type)
    settings = GreedySettings(step=0.1, until=0.4)
    path = greedy_path(model, stats, windows, settings=settings)
    for block in blocks_of(model):
        for step in range(len(path.errors[block.name])):
            state = {name: float(path.sparsities[name][step]) for name in block.projections}
            assert stats.model.mean_sparsity(state) == pytest.approx(0.1 * step)


def test_one_projection_rises_per_round_and_none_falls(path: AllocationPath) -> None:
    for block in ("model.layers.0", "model.layers.1"):
        columns = [c for name, c in path.sparsities.items() if name.startswith(block)]
        rises = torch.stack(columns).diff(dim=1)
        assert (rises >= 0).all()
        assert (rises > 0).sum(0).eq(1).all()


def test_first_choice_is_the_trial_with_the_least_error(
    llama: Prepared, path: AllocationPath
) -> None:
    model, stats, windows = llama
    block = blocks_of(model)[0]
    total = sum(stats.model.weight_size(name) for name in block.projections)
    with torch.no_grad():
        batches = first_batches(model, windows.tokens)
        linears = insert_sparse_linears(
            model, dict.fromkeys(block.projections), TokenSelection(0.0)
        )
        error = BlockError(block, batches, 0)
        trials = {}
        for name, linear in linears.items():
            sparsity = STEP * total / stats.model.weight_size(name)
            plan = allocate(stats, sparsity=sparsity, target_modules=[name])
            linear.rule = plan.projections[name].rule
            trials[name] = error.measure()[0]
            linear.rule = None
    for name, linear in linears.items():
        model.set_submodule(name, linear.replaced)
    chosen = [name for name in block.projections if path.sparsities[name][1] > 0]
    assert chosen == [min(trials, key=trials.get)]
    assert float(path.errors[block.name][1]) == pytest.approx(trials[chosen[0]])


def test_greedy_error_is_below_uniform_error_on_its_own_text(
    llama: Prepared, path: AllocationPath
) -> None:
    model, stats, windows = llama
    uniform = allocate(stats, sparsity=0.5)
    with torch.no_grad():
        batches = first_batches(model, windows.tokens)
        block = blocks_of(model)[0]
        linears = insert_sparse_linears(
            model, dict.fromkeys(block.projections), TokenSelection(0.0)
        )
        error = BlockError(block, batches, 0)
        for name, linear in linears.items():
            linear.rule = uniform.projections[name].rule
        uniform_error = error.measure()[0]
    for name, linear in linears.items():
        model.set_submodule(name, linear.replaced)
    assert float(path.errors[block.name][10]) < uniform_error


def test_equal_trials_go_to_the_first_projection() -> None:
    model, stats, windows = prepare()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    path = greedy_path(model, stats, windows, settings=GreedySettings(step=STEP, until=0.3))
    # Nothing in the block reaches its output, so every trial has error 0.
    assert path.sparsities["model.layers.0.self_attn.q_proj"][1] > 0
    assert float(path.errors["model.layers.0"].abs().sum()) == 0.0


def test_path_between_rounds_meets_the_budget_exactly(
    llama: Prepared, path: AllocationPath
) -> None:
    _, stats, _ = llama
    for sparsity in (0.0, 0.01, 0.123, 0.25, 0.5):
        chosen = sparsities_at(path, sparsity)
        assert stats.model.mean_sparsity(chosen) == pytest.approx(sparsity)


def test_a_target_beyond_the_path_is_refused(path: AllocationPath) -> None:
    with pytest.raises(UserError, match="greedy-until"):
        sparsities_at(path, 0.6)


def test_propagation_changes_later_blocks_only(llama: Prepared, path: AllocationPath) -> None:
    model, stats, windows = llama
    settings = GreedySettings(step=STEP, until=0.5, propagate=0.5)
    propagated = greedy_path(model, stats, windows, settings=settings)
    assert torch.equal(propagated.errors["model.layers.0"], path.errors["model.layers.0"])
    assert not torch.equal(propagated.errors["model.layers.1"], path.errors["model.layers.1"])


def test_only_target_modules_rise(llama: Prepared) -> None:
    model, stats, windows = llama
    settings = GreedySettings(step=0.1, until=0.4)
    path = greedy_path(
        model, stats, windows, target_modules=["gate_proj", "down_proj"], settings=settings
    )
    assert {name.rsplit(".", 1)[-1] for name in path.sparsities} == {"gate_proj", "down_proj"}
    assert stats.model.mean_sparsity(sparsities_at(path, 0.3)) == pytest.approx(0.3)


def test_model_is_dense_afterwards(llama: Prepared) -> None:
    model, stats, windows = llama
    modules = dict(model.named_modules())
    greedy_path(model, stats, windows, settings=GreedySettings(step=0.2, until=0.2))
    assert dict(model.named_modules()) == modules
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_another_models_statistics_are_refused(llama: Prepared) -> None:
    _, stats, windows = llama
    with pytest.raises(UserError, match="another model"):
        greedy_path(tiny_model("qwen2"), stats, windows)


@pytest.mark.parametrize(
    "settings",
    [{"step": 0.0}, {"step": 0.9}, {"until": 1.0}, {"propagate": 0.8}, {"step": float("nan")}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError):
        GreedySettings(**settings)


def test_paths_are_the_same_bit_for_bit_twice(llama: Prepared, path: AllocationPath) -> None:
    model, stats, windows = llama
    again = greedy_path(model, stats, windows, settings=GreedySettings(step=STEP, until=0.5))
    pairs = itertools.chain(
        zip(path.sparsities.values(), again.sparsities.values(), strict=True),
        zip(path.errors.values(), again.errors.values(), strict=True),
    )
    assert all(torch.equal(a, b) for a, b in pairs)
