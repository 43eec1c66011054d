import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.calibration.allocation_path import AllocationPath
from teal.calibration.artifact import CalibrationStats
from teal.calibration.input_statistics import InputStatistics
from teal.foundation.errors import UserError
from teal.foundation.identity import ModelIdentity
from teal.foundation.provenance import TextProvenance

QUERY, KEY, DOWN = "layers.0.q_proj", "layers.0.k_proj", "layers.0.down_proj"
MODEL = ModelIdentity(model_type="llama", shapes={QUERY: (4, 8), KEY: (4, 2), DOWN: (6, 4)})
PATH = AllocationPath(
    settings={"step": 0.1},
    sparsities={DOWN: torch.tensor([0.0, 0.1 + 0.2]).double()},
    errors={"layers.0": torch.tensor([0.0, 1 / 3]).double()},
)


def stats_of(
    rows: slice, *, source: str = "text.txt", sha256: str | None = "abc", **changes: Any
) -> CalibrationStats:
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, projections in {"layers.0.in": (QUERY, KEY), "layers.0.down": (DOWN,)}.items():
        x = torch.randn(100, MODEL.shapes[projections[0]][0], generator=generator)
        inputs[name] = InputStatistics(
            projections=projections, in_features=x.shape[1], dtype="float32"
        )
        inputs[name].add(x[rows])
    start, stop, _ = rows.indices(100)
    text = TextProvenance(
        source=source,
        sha256=sha256,
        offset=start,
        num_tokens=stop - start,
        sequence_length=10,
        fingerprints=torch.arange(start, stop),
    )
    content = {"model": MODEL, "text": text, "dtype": "float32", "inputs": inputs} | changes
    return CalibrationStats(library_version="1.2.3", **content)


def assert_same_inputs(one: CalibrationStats, other: CalibrationStats) -> None:
    assert list(one.inputs) == list(other.inputs)
    for name, mine in one.inputs.items():
        theirs = other.inputs[name]
        assert mine.projections == theirs.projections
        assert mine.count == theirs.count
        assert torch.equal(mine.histogram.counts, theirs.histogram.counts)


def test_projections_that_share_an_input_share_its_statistics() -> None:
    stats = stats_of(slice(None))
    assert stats.of(QUERY) is stats.of(KEY)
    assert stats.of(DOWN) is stats.inputs["layers.0.down"]


def test_unknown_projection_is_refused_with_a_cure() -> None:
    with pytest.raises(UserError, match=r"cover 3 projections, not 'lm_head'\. Calibrate"):
        stats_of(slice(None)).of("lm_head")


def test_saving_and_loading_is_bit_exact(tmp_path: Path) -> None:
    stats = stats_of(slice(None), paths={"greedy": PATH})
    stats.save(tmp_path / "stats")
    loaded = CalibrationStats.load(tmp_path / "stats")
    assert_same_inputs(stats, loaded)
    for name, mine in stats.inputs.items():
        assert torch.equal(mine.mean, loaded.inputs[name].mean)
        assert torch.equal(mine.second_moment, loaded.inputs[name].second_moment)
    assert loaded.paths["greedy"].to_dict() == PATH.to_dict()
    assert torch.equal(loaded.paths["greedy"].sparsities[DOWN], PATH.sparsities[DOWN])
    assert torch.equal(loaded.text.fingerprints, stats.text.fingerprints)
    assert loaded.text.to_dict() == stats.text.to_dict()
    assert (loaded.model, loaded.dtype) == (stats.model, stats.dtype)
    assert loaded.library_version == "1.2.3"


def test_loaded_statistics_save_to_the_same_bytes(tmp_path: Path) -> None:
    stats_of(slice(None), paths={"greedy": PATH}).save(tmp_path / "one")
    CalibrationStats.load(tmp_path / "one").save(tmp_path / "two")
    for name in ("stats.json", "stats.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_statistics_without_moments_or_tokens_survive_saving(tmp_path: Path) -> None:
    stats = stats_of(slice(None))
    stats.inputs["layers.0.in"] = InputStatistics(
        projections=(QUERY, KEY), in_features=4, dtype="float32"
    )
    published = stats.inputs["layers.0.down"]
    stats.inputs["layers.0.down"] = InputStatistics(
        projections=(DOWN,),
        in_features=6,
        dtype="float32",
        histogram=published.histogram,
        count=published.count,
    )
    stats.save(tmp_path / "stats")
    loaded = CalibrationStats.load(tmp_path / "stats")
    assert_same_inputs(stats, loaded)
    assert loaded.of(DOWN).moments is None
    assert loaded.of(QUERY).histogram.total == 0


def test_histograms_are_saved_without_their_empty_ends(tmp_path: Path) -> None:
    stats_of(slice(None)).save(tmp_path / "stats")
    assert (tmp_path / "stats" / "stats.safetensors").stat().st_size < 200_000


def test_existing_folder_is_replaced_by_force_alone(tmp_path: Path) -> None:
    stats_of(slice(0, 10)).save(tmp_path / "stats")
    with pytest.raises(UserError, match="--force"):
        stats_of(slice(None)).save(tmp_path / "stats")
    assert CalibrationStats.load(tmp_path / "stats").of(DOWN).count == 10
    stats_of(slice(None)).save(tmp_path / "stats", force=True)
    assert CalibrationStats.load(tmp_path / "stats").of(DOWN).count == 100


def break_shape(content: dict[str, Any]) -> None:
    content["model"]["shapes"][DOWN] = [7, 4]


def break_first_bin(content: dict[str, Any]) -> None:
    content["inputs"]["layers.0.in"]["first_bin"] = 40_000


def break_projections(content: dict[str, Any]) -> None:
    content["inputs"]["layers.0.in"]["projections"] = 3


def break_newer(content: dict[str, Any]) -> None:
    content["schema_version"] = 99


def break_missing(content: dict[str, Any]) -> None:
    del content["inputs"]["layers.0.in"]["count"]


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (break_shape, r"6 channels.*\(7, 4\)\. Calibrate anew"),
        (break_first_bin, "damaged .* Make it anew"),
        (break_projections, "damaged .* Make it anew"),
        (break_missing, "damaged .* Make it anew"),
        (break_newer, "Update teal"),
    ],
    ids=["shape", "first_bin", "projections", "missing", "newer"],
)
def test_damaged_statistics_are_refused_with_a_cure(tmp_path: Path, change: Any, cure: str) -> None:
    stats_of(slice(None)).save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=cure):
        CalibrationStats.load(tmp_path / "stats")


def test_statistics_know_the_format_of_the_weights(tmp_path: Path) -> None:
    stats_of(slice(None), weight_format="int8").save(tmp_path / "stats")
    assert CalibrationStats.load(tmp_path / "stats").weight_format == "int8"


def test_statistics_of_the_first_schema_are_of_floats(tmp_path: Path) -> None:
    stats_of(slice(None)).save(tmp_path / "stats")
    file = tmp_path / "stats" / "stats.json"
    content = json.loads(file.read_text()) | {"schema_version": 1}
    del content["weight_format"]
    file.write_text(json.dumps(content))
    assert CalibrationStats.load(tmp_path / "stats").weight_format == "float"


@pytest.mark.parametrize(
    ("measured", "model", "cure"),
    [("int8", "float", "Give --quantize int8"), ("float", "int4", "Leave out --quantize")],
)
def test_weights_of_another_format_are_refused_with_a_cure(
    measured: str, model: str, cure: str
) -> None:
    with pytest.raises(
        UserError, match=rf"{measured} weights, the model has {model} ones\. {cure}"
    ):
        stats_of(slice(None), weight_format=measured).require_format(model)
    with pytest.raises(UserError, match="calibrate anew"):
        stats_of(slice(None), weight_format=measured).merge(
            stats_of(slice(None), weight_format=model)
        )


def test_merging_two_halves_of_a_text_equals_one_pass() -> None:
    merged = stats_of(slice(0, 40), paths={"greedy": PATH}).merge(stats_of(slice(40, None)))
    whole = stats_of(slice(None))
    assert_same_inputs(merged, whole)
    for name, mine in merged.inputs.items():
        torch.testing.assert_close(mine.mean, whole.inputs[name].mean, rtol=1e-13, atol=1e-15)
    assert merged.text.to_dict() == whole.text.to_dict()
    assert torch.equal(merged.text.fingerprints, whole.text.fingerprints)
    assert merged.paths == {}


def test_merging_two_texts_names_both() -> None:
    other = stats_of(slice(50, 80), source="other.txt", sha256="def")
    text = stats_of(slice(0, 50)).merge(other).text
    assert (text.source, text.sha256) == ("text.txt + other.txt", None)
    assert (text.offset, text.num_tokens) == (0, 80)


def test_merging_statistics_of_another_model_names_the_first_mismatch() -> None:
    another = replace(MODEL, model_type="mistral")
    with pytest.raises(UserError, match="model type 'llama' here, 'mistral'"):
        stats_of(slice(None)).merge(stats_of(slice(None), model=another))


def test_merging_statistics_of_other_layers_names_the_first() -> None:
    partial = stats_of(slice(None))
    del partial.inputs["layers.0.down"]
    with pytest.raises(UserError, match=r"Only one .* has layers\.0\.down"):
        stats_of(slice(None)).merge(partial)
