import json
from pathlib import Path

import pytest

from teal.benchmark import gemv
from teal.cli import bench
from teal.foundation.errors import UserError


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "_ROTATION_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr("teal.benchmark.timing.read_bandwidth", lambda device: 1e10)


def run(*arguments) -> None:
    bench.app(args=["gemv", *arguments, "--device", "cpu"], standalone_mode=False)


def test_json_stands_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    run("64x48", "--sparsity", "0.5", "--dtype", "float32", "--json")
    content = json.loads(capsys.readouterr().out)
    assert [result["sparsity"] for result in content["results"]] == [0.5]
    assert content["machine"]["versions"]["torch"]


def test_a_table_names_the_product(capsys: pytest.CaptureFixture[str]) -> None:
    run("64x48", "--sparsity", "0,0.5")
    assert "memory reads 10 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["llama-9"], "Unknown model or size"),
        (["64x48", "--sparsity", "half"], "is not a list of fractions"),
        (["64x48", "--sparsity", "1.5"], r"outside \[0, 1\)"),
        (["64x48", "--dtype", "int8"], "Unknown dtype"),
        (["64x48", "--dtype", "auto"], "Give a --dtype"),
        (["64x48", "--tune", "tables"], "on a GPU"),
        (["64x48", "--baseline-teal", "nowhere"], "Give a checkout"),
        (["64x48", "--tables", "nowhere"], "'nowhere' holds no table"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_quantized_products_are_shown_beside_floats(capsys: pytest.CaptureFixture[str]) -> None:
    run("64x48", "--sparsity", "0,0.5", "--quantize", "int4", "--group-size", "32")
    printed = capsys.readouterr().out
    assert "bfloat16 × int4" in printed
    assert "floats" in printed


def test_tile_configurations_of_quantized_products_are_searched_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on a GPU"):
        run("64x48", "--quantize", "int8", "--tune", str(tmp_path / "tables"))
    assert not (tmp_path / "tables").exists()
