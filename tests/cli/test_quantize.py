from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from teal.checkpoints.quantized import QuantizedCheckpoint
from tests.cli.conftest import MODEL, Teal


@pytest.mark.parametrize(
    ("weight_format", "bits"), [("fp8", 8.04), ("int4", 4.125), ("int8", 8.04)]
)
def test_a_model_folder_is_written_that_others_open(
    teal: Teal, tmp_path: Path, weight_format: str, bits: float
) -> None:
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "model"
    outcome = teal("quantize", MODEL, "--format", weight_format, "--out", out, "--json")
    assert outcome.code == 0
    assert outcome.json["projections"] == 56
    assert outcome.json["bits_per_weight"] == pytest.approx(bits, abs=0.01)
    assert outcome.json["bytes_dense"] == pytest.approx(
        outcome.json["bytes_quantized"] * 16 / outcome.json["bits_per_weight"]
    )
    assert {weight.format for _, weight in QuantizedCheckpoint(out)} == {weight_format}
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.config.hidden_size == 384
    assert not report["missing_keys"]


def test_gptq_takes_a_text_and_group_size_and_zeros_what_was_asked_for(
    teal: Teal, tmp_path: Path, workspace: Path
) -> None:
    outcome = teal(
        "quantize", MODEL, "--format", "int4", "--group-size", "64", "--asymmetric",
        "--method", "gptq", "--text", workspace / "calibration.txt", "--tokens", "128",
        "--sequence-length", "64", "--out", tmp_path / "model",
    )  # fmt: skip
    assert outcome.code == 0
    assert "int4" in outcome.out
    _, weight = next(iter(QuantizedCheckpoint(tmp_path / "model")))
    assert weight.group_size == 64
    assert weight.zeros is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--format", "int3"], ["Unknown format", "int4"], id="format"),
        pytest.param(["--format", "int4", "--group-size", "7"], ["7", "128"], id="group size"),
        pytest.param(["--format", "int8", "--group-size", "64"], ["one scale"], id="int8 groups"),
        pytest.param(["--format", "int4", "--method", "gtpq"], ["'gptq'"], id="method"),
        pytest.param(["--format", "int4", "--method", "gptq"], ["--text"], id="no text"),
        pytest.param(["--format", "int4", "--text", "t.txt"], ["--method gptq"], id="needless"),
        pytest.param(["--format", "int8", "--device", "tpu"], ["Unknown device"], id="device"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    teal: Teal, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    out = tmp_path / "model"
    assert teal("quantize", MODEL, *options, "--out", out).is_error(*words)
    assert not out.exists()


def test_a_quantized_model_is_not_quantized_again(teal: Teal, tmp_path: Path) -> None:
    assert teal("quantize", MODEL, "--format", "int8", "--out", tmp_path / "once").code == 0
    outcome = teal("quantize", tmp_path / "once", "--format", "int4", "--out", tmp_path / "twice")
    assert outcome.is_error("quantized already", "dense model")
    assert not (tmp_path / "twice").exists()


def test_an_existing_output_is_kept_without_force(teal: Teal, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert teal("quantize", MODEL, "--format", "int8", "--out", out).code == 0
    before = (out / "model.safetensors").read_bytes()
    assert teal("quantize", MODEL, "--format", "int4", "--out", out).is_error("--force")
    assert (out / "model.safetensors").read_bytes() == before
    assert teal("quantize", MODEL, "--format", "int4", "--out", out, "--force").code == 0


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal.models.loading.load_model", pytest.fail)
    (tmp_path / "file").write_text("")
    outcome = teal("quantize", MODEL, "--format", "int8", "--out", tmp_path / "file" / "model")
    assert outcome.is_error("Cannot write")
