import json
from pathlib import Path

import pytest

from teal.calibration import CalibrationStats
from tests.cli.conftest import Teal

MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MISTRAL))
    return path


def test_published_histograms_become_statistics(
    teal: Teal, shared_data: Path, config: Path, tmp_path: Path
) -> None:
    outcome = teal(
        "import", shared_data / "teal/Mistral-7B", "--config", config, "--allow-missing",
        "--out", tmp_path / "stats",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert len(CalibrationStats.load(tmp_path / "stats").inputs) == 16


def test_missing_layers_are_named(
    teal: Teal, shared_data: Path, config: Path, tmp_path: Path
) -> None:
    outcome = teal(
        "import", shared_data / "teal/Mistral-7B", "--config", config, "--out", tmp_path / "stats"
    )
    assert outcome.is_error("--allow-missing")
    assert not (tmp_path / "stats").exists()


def test_a_folder_without_histograms_is_refused(teal: Teal, config: Path, tmp_path: Path) -> None:
    outcome = teal("import", tmp_path, "--config", config, "--out", tmp_path / "stats")
    assert outcome.is_error("histograms")
