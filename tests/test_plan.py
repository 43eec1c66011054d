import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teal.foundation.artifact import load_artifact, save_artifact
from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.methods import MaskRule
from teal.methods.rule_path import RulePath
from teal.plan import SCHEMA_VERSION, PlannedProjection, SparsityPlan
from tests.helpers import plan_of

IDENTITY = ModelIdentity(
    model_type="llama",
    shapes={"layers.0.q_proj": (4, 8), "layers.0.k_proj": (4, 2), "layers.0.down_proj": (16, 4)},
)
Q, K, DOWN = IDENTITY.shapes

# NaN and the infinities are values like others in a vector.
vectors = st.none() | st.lists(st.floats(width=32), min_size=4, max_size=4).map(torch.tensor)
fractions = st.floats(0, 1, exclude_max=True)


def planned(sparsity: float = 0.5, **rule: Any) -> PlannedProjection:
    mask_rule = MaskRule(**rule) if rule else None
    return PlannedProjection(target_sparsity=sparsity, rule=mask_rule)


def plan_with_vectors() -> SparsityPlan:
    score_scale, shift = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, -0.5, 0.0, -0.0])
    projections = {
        Q: planned(threshold=0.1, score_scale=score_scale, shift=shift.bfloat16()),
        K: planned(threshold=0.25),
        DOWN: planned(0.0),
    }
    return plan_of(IDENTITY, projections)


def plan_with_path() -> SparsityPlan:
    """A plan at 0.5, where `DOWN` has no rule yet; the path gives it a scaled one at 0.8."""
    plan = plan_with_vectors()
    at_target = {name: (p.target_sparsity, p.rule) for name, p in plan.projections.items()}
    down = MaskRule(threshold=0.75, shift=torch.arange(16.0))
    points = {
        0.0: dict.fromkeys(plan.projections, (0.0, None)),
        0.5: at_target,
        0.8: {name: (0.8, rule or down) for name, (_, rule) in at_target.items()},
    }
    return replace(plan, path=RulePath.from_points(points))


def rules_of(plan: SparsityPlan) -> dict[str, Any]:
    """Everything that the rules of a plan say, in a form that can be compared."""
    return {
        name: (planned.target_sparsity, planned.rule.threshold, sorted(planned.rule.vectors))
        for name, planned in plan.projections.items()
        if planned.rule
    }


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_edited(folder: Path, change: Any, plan: SparsityPlan | None = None) -> None:
    (plan or plan_with_vectors()).save(folder)
    content = json.loads((folder / "plan.json").read_text())
    change(content)
    (folder / "plan.json").write_text(json.dumps(content))


def test_saving_loading_and_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    plan_with_path().save(tmp_path / "one")
    SparsityPlan.load(tmp_path / "one").save(str(tmp_path / "two"))
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_loaded_plan_says_the_same_as_the_saved(tmp_path: Path) -> None:
    plan = replace(plan_with_vectors(), weight_format="int8")
    plan.save(tmp_path / "plan")
    loaded = SparsityPlan.load(tmp_path / "plan")
    names = ("model", "method", "strategy", "target_sparsity", "dtype", "library_version")
    for name in (*names, "weight_format"):
        assert getattr(loaded, name) == getattr(plan, name)
    assert loaded.calibration.to_dict() == plan.calibration.to_dict()
    assert torch.equal(loaded.calibration.fingerprints, plan.calibration.fingerprints)
    assert list(loaded.projections) == list(plan.projections)


@given(
    threshold=st.floats(0), target=fractions, whole=fractions, score_scale=vectors, shift=vectors
)
def test_round_trip_keeps_every_bit_of_any_number(
    threshold: float,
    target: float,
    whole: float,
    score_scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> None:
    rule = MaskRule(threshold=threshold, score_scale=score_scale, shift=shift)
    plan = plan_of(
        IDENTITY, {Q: PlannedProjection(target_sparsity=target, rule=rule)}, target_sparsity=whole
    )
    with TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan")
        loaded = SparsityPlan.load(Path(folder) / "plan")
    found = loaded.projections[Q]
    assert found.rule is not None
    assert (found.rule.threshold, found.target_sparsity) == (rule.threshold, target)
    assert loaded.target_sparsity == whole
    assert found.rule.vectors.keys() == rule.vectors.keys()
    for kind, vector in rule.vectors.items():
        assert torch.equal(found.rule.vectors[kind].view(torch.int32), vector.view(torch.int32))


def test_plan_can_be_read_by_eye(tmp_path: Path) -> None:
    plan_with_vectors().save(tmp_path / "plan")
    content = json.loads((tmp_path / "plan/plan.json").read_text())
    assert content["projections"][Q] == {
        "target_sparsity": 0.5,
        "threshold": torch.tensor(0.1).item(),
        "vectors": ["score_scale", "shift"],
        "weight_size": 32,
    }
    assert content["projections"][DOWN]["threshold"] is None


def test_plan_at_its_own_target_is_the_plan() -> None:
    assert all(plan.at(0.5) is plan for plan in (plan_with_path(), plan_with_vectors()))


@pytest.mark.parametrize("plan", [plan_with_path(), plan_with_vectors()], ids=["path", "no path"])
def test_plan_at_sparsity_zero_has_no_rules(plan: SparsityPlan) -> None:
    dense = plan.at(0.0)
    assert (rules_of(dense), dense.target_sparsity, dense.sparsity_budget) == ({}, 0.0, 0.0)
    assert list(dense.projections) == list(plan.projections)


def test_plan_at_a_point_of_the_path_has_the_rules_of_the_point() -> None:
    plan = plan_with_path()
    assert rules_of(plan.at(0.8)) == {
        Q: (0.8, plan.projections[Q].rule.threshold, ["score_scale", "shift"]),
        K: (0.8, 0.25, []),
        DOWN: (0.8, 0.75, ["shift"]),
    }


def test_plan_at_another_sparsity_keeps_the_whole_path() -> None:
    plan = plan_with_path()
    assert rules_of(plan.at(0.7).at(0.3)) == rules_of(plan.at(0.3))
    assert rules_of(plan.at(0.7).at(0.5)) == rules_of(plan)


def test_plan_without_a_path_refuses_other_sparsities_with_a_cure() -> None:
    with pytest.raises(UserError, match=r"rules of sparsity 0\.5; 0\.3 was .* Allocate a plan at"):
        plan_with_vectors().at(0.3)


def test_path_of_other_projections_is_refused() -> None:
    with pytest.raises(UserError, match="path is that of other projections"):
        replace(plan_with_path(), projections={Q: planned()})


def test_path_passes_through_a_file_bit_for_bit(tmp_path: Path) -> None:
    plan = plan_with_path()
    plan.save(tmp_path / "plan")
    loaded = SparsityPlan.load(tmp_path / "plan")
    for sparsity in (0.1, 0.5, 0.65, 0.8):
        assert rules_of(loaded.at(sparsity)) == rules_of(plan.at(sparsity))
    shift = loaded.at(0.8).projections[DOWN].rule.shift
    assert torch.equal(shift, plan.at(0.8).projections[DOWN].rule.shift)


@pytest.mark.parametrize("version", [1, 2])
def test_plan_of_an_older_schema_loads_without_what_is_newer(version: int, tmp_path: Path) -> None:
    def age(content: dict[str, Any]) -> None:
        content["schema_version"] = version
        for field in ("weight_format", "path")[: 3 - version]:
            del content[field]

    save_edited(tmp_path / "plan", age, plan_with_path())
    loaded = SparsityPlan.load(tmp_path / "plan")
    assert (loaded.path is None, loaded.weight_format) == (version == 1, "float")
    assert rules_of(loaded) == rules_of(plan_with_path())


def test_plan_that_calls_the_score_scale_scale_is_read(tmp_path: Path) -> None:
    def old_name(name: str) -> str:
        return re.sub(r"score_scale$", "scale", name)

    plan = plan_with_path()
    plan.save(tmp_path / "plan")
    content, tensors = load_artifact(tmp_path / "plan", "plan", SCHEMA_VERSION)
    content["schema_version"] = 3
    for projection in content["projections"].values():
        projection["vectors"] = [old_name(kind) for kind in projection["vectors"]]
    old = {old_name(name): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_artifact(tmp_path / "old", "plan", content, old)
    loaded = SparsityPlan.load(tmp_path / "old")
    for sparsity in (0.5, 0.65, 0.8):
        assert rules_of(loaded.at(sparsity)) == rules_of(plan.at(sparsity))
    scale = plan.projections[Q].rule.score_scale
    assert torch.equal(loaded.at(0.8).projections[Q].rule.score_scale, scale)


def test_budget_is_the_mean_weighted_by_weight_size() -> None:
    assert plan_with_vectors().sparsity_budget == 0.5 * (32 + 8) / (32 + 8 + 64)


@pytest.mark.parametrize("sparsity", [1.0, -0.5, float("nan")])
def test_target_that_is_no_fraction_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"^Target sparsity .* Give a fraction"):
        planned(sparsity)
    with pytest.raises(UserError, match=r"^Target sparsity .* Give a fraction"):
        plan_of(IDENTITY, {}, target_sparsity=sparsity)
    with pytest.raises(UserError, match=r"^Sparsity .* Give a fraction"):
        plan_with_path().at(sparsity)


def test_projection_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"names 'layers\.9\.q_proj', which its model does not have"
    ):
        plan_of(IDENTITY, {Q: planned(), "layers.9.q_proj": planned()})


@pytest.mark.parametrize("kind", ["score_scale", "shift"])
@pytest.mark.parametrize("shape", [(8,), (4, 1), ()], ids=str)
def test_vector_of_another_shape_than_the_input_is_refused(
    kind: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UserError, match=rf"The {kind} of {Q} has shape .* its input \(4,\)\. Make"):
        plan_of(IDENTITY, {Q: planned(threshold=1.0, **{kind: torch.ones(shape)})})


def set_threshold(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["projections"][Q].update(threshold=value)


@pytest.mark.parametrize("value", [float("nan"), -0.5, float("-inf"), "much", [1.0], {}], ids=repr)
def test_damaged_threshold_is_refused_with_a_cure(value: object, tmp_path: Path) -> None:
    save_edited(tmp_path / "plan", set_threshold(value))
    with pytest.raises(UserError, match=r"(Calibrate|Make it) anew\.$"):
        SparsityPlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    "key",
    [
        "method",
        "strategy",
        "target_sparsity",
        "dtype",
        "calibration",
        "projections",
        "model",
        "path",
    ],
)
def test_missing_part_is_refused_with_a_cure(key: str, tmp_path: Path) -> None:
    save_edited(tmp_path / "plan", lambda content: content.pop(key))
    with pytest.raises(UserError, match=rf"damaged \(KeyError: '{key}'\)\. Make it anew\.$"):
        SparsityPlan.load(tmp_path / "plan")


@pytest.mark.parametrize("key", ["target_sparsity", "calibration", "projections", "model"])
def test_part_of_another_form_is_refused_with_a_cure(key: str, tmp_path: Path) -> None:
    save_edited(tmp_path / "plan", lambda content: content.update({key: [[3]]}))
    with pytest.raises(UserError, match=r"plan' is damaged \(.*\)\. Make it anew\.$"):
        SparsityPlan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["projections"][Q].pop("threshold"),
        lambda content: content["projections"][Q].update(vectors=["weight"]),
        lambda content: content["projections"][K].update(vectors=["score_scale"]),
        lambda content: content["model"]["shapes"].update({K: [4]}),
        lambda content: content["calibration"].update(num_tokens=1e999),
        lambda content: content.update(path={"points": 3, "end": 0.8}),
        lambda content: content.pop("tensors_sha256"),
    ],
    ids=[
        "no threshold",
        "unknown vector",
        "vector without tensor",
        "shape of one number",
        "endless text",
        "path without tensors",
        "no tensors",
    ],
)
def test_damaged_detail_is_refused_with_a_cure(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    save_edited(tmp_path / "plan", change)
    with pytest.raises(UserError, match=r"plan' is damaged \(.*\)\. Make it anew\.$"):
        SparsityPlan.load(tmp_path / "plan")


def test_plan_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    save_edited(tmp_path / "plan", lambda content: content.update(schema_version=99))
    with pytest.raises(UserError, match=r"schema version 99, .* Update teal\."):
        SparsityPlan.load(tmp_path / "plan")


def test_existing_plan_is_replaced_only_by_force(tmp_path: Path) -> None:
    plan_with_vectors().save(tmp_path / "plan")
    other = plan_of(IDENTITY, {})
    with pytest.raises(UserError, match="--force"):
        other.save(tmp_path / "plan")
    other.save(tmp_path / "plan", force=True)
    assert not SparsityPlan.load(tmp_path / "plan").projections
