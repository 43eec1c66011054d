from pathlib import Path

import pytest

from tests.cli.conftest import MODEL, Teal

SIZES = "hidden=64,intermediate=96,layers=2,heads=4,kv-heads=2,vocab=50"
QUICK = ("--prompt-tokens", 4, "--new-tokens", 4, "--repeats", 1, "--device", "cpu")


@pytest.fixture(autouse=True)
def _bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal.benchmark.timing.read_bandwidth", lambda device: 1e10)


@pytest.fixture
def decode(teal: Teal) -> Teal:
    """Measure little, with further options."""
    return lambda *options: teal("bench", "decode", *options, *QUICK)


def test_json_holds_machine_bandwidth_and_a_record_per_runner(decode: Teal) -> None:
    content = decode(MODEL, "--sparsity", "0.5", "--baseline", "transformers", "--json").json
    assert content["bandwidth"] == 1e10
    assert content["machine"]["versions"]["torch"]
    rows = [(row["runner"], row["sparsity"]) for row in content["results"]]
    assert rows == [("teal", 0.0), ("teal", 0.5), ("transformers", 0.0)]
    for row in content["results"]:
        assert row["tokens_per_second"] == pytest.approx(1e6 / row["token"]["median"])
        assert row["limit"] == pytest.approx(row["read"] * 1e-4)


def test_a_table_names_models_and_sizes(decode: Teal, tmp_path: Path) -> None:
    outcome = decode(MODEL, "--config", SIZES, "--sparsity", "0.5", "--plot", tmp_path / "plot.svg")
    assert outcome.code == 0, outcome.err
    assert "memory reads 10 GB/s" in outcome.out
    assert "py-16m" in outcome.out
    assert (tmp_path / "plot.svg").read_text().count('id="axes_') == 2


def test_a_profile_shows_the_operations_of_a_step(decode: Teal) -> None:
    out = decode("--config", SIZES, "--sparsity", "0.5", "--profile").out
    assert "50.0 % sparse" in out
    assert "teal::sparse_linear" in out


def test_formats_are_measured_one_after_the_other(decode: Teal) -> None:
    formats = ("--quantize", "none", "--quantize", "int8", "--quantize", "int4")
    options = ("--sparsity", "0.5", "--group-size", 32, "--quantize-head", "--json")
    for model in (MODEL, "--config=" + SIZES):
        results = decode(model, *formats, *options).json["results"]
        dense = [row for row in results if not row["sparsity"]]
        weights = [row["weights"] for row in dense]
        assert [row["format"] for row in weights] == ["float", "int8", "int4"]
        assert [row["group_size"] for row in weights] == [None, None, 32]
        assert [row["head_format"] for row in weights] == ["float", "int8", "int8"]
        assert dense[0]["read"] > dense[1]["read"] > dense[2]["read"]
        assert all(row["speed_up"] == 1.0 for row in dense)


def test_a_table_names_format_and_group_size(decode: Teal) -> None:
    out = decode("--config", SIZES, "--quantize", "int4", "--group-size", 32, "--sparsity", 0.5).out
    assert "int4/32" in out


def test_a_head_alone_can_be_rounded(decode: Teal) -> None:
    options = ("--config", SIZES, "--quantize-head", "--sparsity", "0.5", "--json")
    for row in decode(*options).json["results"]:
        assert row["weights"] == {"format": "float", "group_size": None, "head_format": "int8"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param([MODEL, "--quantize", "int3"], ["Unknown format 'int3'"], id="format"),
        pytest.param(
            [MODEL, "--quantize", "int8", "--group-size", 64], ["--quantize int4"], id="no groups"
        ),
        pytest.param(
            [MODEL, "--quantize", "int4", "--group-size", 48], ["Group size 48"], id="groups"
        ),
        pytest.param([], ["no model to measure"], id="no model"),
        pytest.param(["--config", "llama-9"], ["Unknown configuration"], id="configuration"),
        pytest.param([MODEL, "--sparsity", "half"], ["not a list of fractions"], id="sparsity"),
        pytest.param(
            [MODEL, "--baseline", "gpt-fast"], ["Unknown baseline 'gpt-fast'"], id="baseline"
        ),
        pytest.param([MODEL, "--baseline", "llama-cpp"], ["Give --gguf"], id="no gguf"),
        pytest.param([MODEL, "--dtype", "auto"], ["--dtype", "bfloat16"], id="dtype auto"),
        pytest.param([MODEL, "--dtype", "int8"], ["Unknown dtype"], id="dtype"),
        pytest.param(["no-such-folder"], ["not a model folder"], id="missing"),
    ],
)
def test_bad_input_is_one_line(decode: Teal, options: list[str], words: list[str]) -> None:
    assert decode(*options).is_error(*words)
