"""What every method has to keep to; a new method is one row of `DOCUMENTED`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal.calibration.input_statistics import InputStatistics
from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.kernels.reference.matmul import keep_mask
from teal.methods import METHODS, MaskRule, method_named, register_method
from teal.plan import PlannedProjection, SparsityPlan
from tests.helpers import TOLERANCES, plan_of

NAME = "model.layers.0.self_attn.q_proj"
IN_FEATURES = 64


def _teal_drops(x: Tensor, rule: MaskRule) -> Tensor:
    return x.abs() <= rule.threshold


# Which entries of float32 activations, (rows, in_features), a rule drops by the paper's words.
DOCUMENTED: dict[str, Callable[[Tensor, MaskRule], Tensor]] = {"teal": _teal_drops}

method_names = pytest.mark.parametrize("name", sorted(METHODS))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
distributions = pytest.mark.parametrize("distribution", ["gauss", "laplace", "outliers"])
sparsities = pytest.mark.parametrize("sparsity", [0.01, 0.25, 0.4, 0.5, 0.65, 0.9, 0.99])


def activations(distribution: str = "gauss", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, IN_FEATURES, generator=generator)
    if distribution == "laplace":
        x = x.sign() * torch.empty_like(x).exponential_(generator=generator) * 1e-3
    if distribution == "outliers":
        x[:, 3] *= 1000
    return x.to(dtype)


@cache
def statistics_of(distribution: str, dtype: torch.dtype) -> InputStatistics:
    x = activations(distribution, dtype)
    statistics = InputStatistics(
        projections=(NAME,), in_features=IN_FEATURES, dtype=str(x.dtype).removeprefix("torch.")
    )
    statistics.add(x)
    return statistics


def rule_of(
    name: str,
    distribution: str = "gauss",
    dtype: torch.dtype = torch.float32,
    sparsity: float = 0.5,
) -> MaskRule:
    rule = method_named(name).rule(statistics_of(distribution, dtype), sparsity)
    assert rule is not None
    return rule


def drops(rule: MaskRule, x: Tensor) -> Tensor:
    return ~keep_mask(x, rule.threshold, **rule.vectors)


@method_names
@distributions
@dtypes
@sparsities
def test_rule_reaches_its_sparsity_on_its_own_statistics(
    name: str, distribution: str, dtype: torch.dtype, sparsity: float
) -> None:
    x = activations(distribution, dtype)
    rule = rule_of(name, distribution, dtype, sparsity)
    effective = drops(rule, x).double().mean().item()
    # Activations of 8 mantissa bits tie; no threshold lies between those that are equal.
    ties = (x.abs() == rule.threshold).double().mean().item()
    assert effective == pytest.approx(sparsity, abs=TOLERANCES["sparsity"] + ties)


@method_names
def test_sparsity_zero_means_no_rule(name: str) -> None:
    assert method_named(name).rule(statistics_of("gauss", torch.float32), 0.0) is None


@method_names
def test_more_sparsity_drops_a_superset(name: str) -> None:
    x = activations()
    less, more = (drops(rule_of(name, sparsity=sparsity), x) for sparsity in (0.4, 0.6))
    assert not (less & ~more).any()


@method_names
def test_mask_is_as_documented(name: str) -> None:
    x = activations("outliers")
    rule = rule_of(name, "outliers")
    assert torch.equal(drops(rule, x), DOCUMENTED[name](x, rule))


@method_names
def test_rule_passes_through_a_plan_bit_for_bit(name: str, tmp_path: Path) -> None:
    rule = rule_of(name, "laplace")
    identity = ModelIdentity(model_type="llama", shapes={NAME: (IN_FEATURES, 8)})
    planned = PlannedProjection(target_sparsity=0.5, rule=rule)
    plan_of(identity, {NAME: planned}).save(tmp_path / "plan")
    loaded = SparsityPlan.load(tmp_path / "plan").projections[NAME].rule
    assert loaded is not None
    assert loaded.threshold == rule.threshold
    assert loaded.vectors.keys() == rule.vectors.keys()
    for kind, vector in rule.vectors.items():
        assert loaded.vectors[kind].dtype == vector.dtype
        assert torch.equal(loaded.vectors[kind], vector)


@method_names
def test_method_is_registered_under_its_own_name(name: str) -> None:
    assert METHODS[name].name == name


def test_registered_method_is_found_and_its_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.methods.METHODS", dict(METHODS))

    class Everything:
        name = "everything"

        def rule(self, statistics: object, sparsity: float) -> MaskRule | None:
            return MaskRule(threshold=float("inf")) if sparsity else None

    method = Everything()
    register_method(method)
    assert method_named("everything") is method
    with pytest.raises(ValueError, match="'everything' is already registered"):
        register_method(Everything())


def test_unknown_method_is_refused_with_the_closest() -> None:
    with pytest.raises(UserError, match=r"Unknown method 'teel'\. Did you mean 'teal'\? Known:"):
        method_named("teel")
