import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from teal.foundation.errors import UserError
from teal.methods import MaskRule
from teal.plan import SCHEMA_VERSION, PlannedProjection, SparsityPlan
from tests.helpers import plan_of
from tests.plans import DOWN, IDENTITY, K, Q, plan_with_path, plan_with_vectors, rules_of

# NaN and the infinities are values like others in a vector.
vectors = st.none() | st.lists(st.floats(width=32), min_size=4, max_size=4).map(torch.tensor)
fractions = st.floats(0, 1, exclude_max=True)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "plan.json").read_text())
    change(content)
    (folder / "plan.json").write_text(json.dumps(content))


def save_edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plan_with_vectors().save(folder)
    edit(folder, change)


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


def test_path_passes_through_a_file_bit_for_bit(tmp_path: Path) -> None:
    plan = plan_with_path()
    plan.save(tmp_path / "plan")
    loaded = SparsityPlan.load(tmp_path / "plan")
    for sparsity in (0.1, 0.5, 0.65, 0.8):
        assert rules_of(loaded.at(sparsity)) == rules_of(plan.at(sparsity))
    shift = loaded.at(0.8).projections[DOWN].rule.shift
    assert torch.equal(shift, plan.at(0.8).projections[DOWN].rule.shift)


def save_aged(folder: Path, plan: SparsityPlan, version: int) -> None:
    """Save a plan as a release with an older schema wrote it."""

    def age(content: dict[str, Any]) -> None:
        content["schema_version"] = version
        for field in ("weight_format", "path")[: max(0, 3 - version)]:
            del content[field]
        for projection in content["projections"].values():
            projection["vectors"] = [old_names.get(kind, kind) for kind in projection["vectors"]]
        content["tensors_sha256"] = sha256((folder / "plan.safetensors").read_bytes()).hexdigest()

    old_names = {"score_scale": "scale"}
    plan.save(folder)
    tensors = load_file(folder / "plan.safetensors")
    old = {name.replace(".score_scale", ".scale"): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, folder / "plan.safetensors")
    edit(folder, age)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_plan_of_an_older_schema_loads_without_what_is_newer(version: int, tmp_path: Path) -> None:
    plan = replace(plan_with_path(), weight_format="int8")
    save_aged(tmp_path / "plan", plan, version)
    loaded = SparsityPlan.load(tmp_path / "plan")
    assert (loaded.path is None) == (version == 1)
    assert loaded.weight_format == ("int8" if version == 3 else "float")
    assert rules_of(loaded) == rules_of(plan)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_scale_of_an_older_schema_is_the_score_scale(version: int, tmp_path: Path) -> None:
    plan = plan_with_path()
    save_aged(tmp_path / "plan", plan, version)
    loaded = SparsityPlan.load(tmp_path / "plan")
    for sparsity in (0.5,) if version == 1 else (0.5, 0.65, 0.8):
        expected, found = (p.at(sparsity).projections[Q].rule for p in (plan, loaded))
        assert torch.equal(found.score_scale, expected.score_scale)
        assert torch.equal(found.shift, expected.shift)
        assert rules_of(loaded.at(sparsity)) == rules_of(plan.at(sparsity))


def test_scale_is_no_vector_of_the_present_schema(tmp_path: Path) -> None:
    save_aged(tmp_path / "plan", plan_with_vectors(), SCHEMA_VERSION)
    with pytest.raises(UserError, match=r"plan' is damaged"):
        SparsityPlan.load(tmp_path / "plan")


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
