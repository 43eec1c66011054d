import shutil
from pathlib import Path

import pytest
import torch

from teal.calibration import CalibrationStats
from tests.cli.conftest import MODEL, WINDOW, Outcome, Teal


def test_statistics_tell_model_and_text(workspace: Path) -> None:
    stats = CalibrationStats.load(workspace / "stats")
    assert (len(stats.inputs), len(stats.model.shapes)) == (32, 56)
    assert stats.text.num_tokens == 1024
    assert stats.text.source.endswith("calibration.txt")
    assert stats.dtype == "bfloat16"


def test_statistics_and_plans_know_the_format_of_the_weights(
    teal: Teal, workspace: Path, tmp_path: Path
) -> None:
    assert calibrate(teal, workspace, quantize="int8", out=tmp_path / "stats").code == 0
    stats = CalibrationStats.load(tmp_path / "stats")
    dense = CalibrationStats.load(workspace / "stats")
    assert stats.weight_format == "int8"
    name = "model.layers.7.down_input"
    assert stats.inputs[name].quantile(0.5) != dense.inputs[name].quantile(0.5)
    options = ("--sparsity", "0.5", "--out", tmp_path / "plan")
    assert teal("allocate", tmp_path / "stats", *options).code == 0
    assert teal("inspect", tmp_path / "plan", "--json").json["weight_format"] == "int8"
    assert "bfloat16 with int8 weights" in teal("inspect", tmp_path / "plan").out


def test_a_quantized_folder_is_calibrated_as_the_model_that_was_rounded(
    teal: Teal, workspace: Path, tmp_path: Path
) -> None:
    assert teal("quantize", MODEL, "--format", "int8", "--out", tmp_path / "q").code == 0
    options = (
        "--text",
        workspace / "calibration.txt",
        "--tokens",
        256,
        "--sequence-length",
        WINDOW,
    )
    assert teal("calibrate", tmp_path / "q", *options, "--out", tmp_path / "a").code == 0
    assert calibrate(teal, workspace, quantize="int8", out=tmp_path / "b").code == 0
    folder, rounded = (CalibrationStats.load(tmp_path / name) for name in "ab")
    assert folder.weight_format == "int8"
    for name, entry in folder.inputs.items():
        assert torch.equal(entry.histogram.counts, rounded.inputs[name].histogram.counts)


def calibrate(teal: Teal, folder: Path, **changed) -> Outcome:
    options = {
        "text": folder / "calibration.txt",
        "tokens": "256",
        "sequence-length": WINDOW,
        "out": folder / "new-stats",
        **changed,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    return teal("calibrate", MODEL, *arguments)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"text": "missing.txt"}, ["missing.txt", "does not exist"], id="missing text"),
        pytest.param({"tokens": "9999999"}, ["9999999", "longer text"], id="too few tokens"),
        pytest.param({"tokens": "32"}, ["less than one window"], id="less than a window"),
        pytest.param({"sequence-length": "4096"}, ["context of 1024"], id="beyond the context"),
        pytest.param({"device": "tpu"}, ["Unknown device", "cuda"], id="unknown device"),
        pytest.param({"quantize": "int3"}, ["Unknown format 'int3'"], id="unknown format"),
        pytest.param({"group-size": "64"}, ["Give --quantize int4"], id="groups of nothing"),
        pytest.param({"dtype": "int8"}, ["Unknown dtype", "bfloat16"], id="unknown dtype"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    teal: Teal, workspace: Path, changed: dict[str, object], words: list[str]
) -> None:
    assert calibrate(teal, workspace, **changed).is_error(*words)
    assert not (workspace / "new-stats").exists()


def test_empty_text_is_refused(teal: Teal, workspace: Path) -> None:
    (workspace / "empty.txt").write_text(" \n")
    outcome = calibrate(teal, workspace, text=workspace / "empty.txt")
    assert outcome.is_error("is empty")


def test_an_existing_output_is_kept_without_force(teal: Teal, workspace: Path) -> None:
    before = (workspace / "stats/stats.json").read_bytes()
    assert calibrate(teal, workspace, out=workspace / "stats").is_error("--force")
    assert (workspace / "stats/stats.json").read_bytes() == before


def test_force_does_not_delete_what_teal_did_not_write(
    teal: Teal, tmp_path: Path, workspace: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    outcome = teal(
        "allocate", workspace / "stats", "--sparsity", "0.5", "--out", tmp_path, "--force"
    )
    assert outcome.is_error("thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        pytest.param("nothing", None, ["not a model folder"], id="missing folder"),
        pytest.param("empty", "", ["no config.json"], id="no config"),
        pytest.param(
            "mamba", '{"model_type": "mamba"}', ["'mamba' is not supported", "llama"], id="family"
        ),
    ],
)
def test_what_is_not_a_model_is_refused(
    teal: Teal,
    tmp_path: Path,
    workspace: Path,
    name: str,
    config: str | None,
    words: list[str],
) -> None:
    if config is not None:
        (tmp_path / name).mkdir()
    if config:
        (tmp_path / name / "config.json").write_text(config)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{MODEL}/{file}", tmp_path / name)
    outcome = teal(
        "calibrate", tmp_path / name, "--text", workspace / "calibration.txt",
        "--out", tmp_path / "stats",
    )  # fmt: skip
    assert outcome.is_error(*words)
