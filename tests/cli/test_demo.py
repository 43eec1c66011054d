import re
from pathlib import Path

import pytest

from teal.allocation import GreedySettings
from teal.cli import demo
from tests.cli.conftest import MODEL, Teal


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a fraction of its text."""
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "GREEDY_TOKENS", 64)
    monkeypatch.setattr(demo, "GREEDY", GreedySettings(step=0.025, until=0.05))
    monkeypatch.setattr(demo, "SPARSITIES", (0.05,))
    monkeypatch.setattr(demo, "SHOWN_SPARSITY", 0.05)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    monkeypatch.setattr(demo, "ROUNDS", 1)


def test_demo_prints_the_table_and_leaves_a_report_with_plots(
    teal: Teal, short_demo: None, tmp_path: Path
) -> None:
    outcome = teal("demo", MODEL, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert re.search(r"uniform.*5\.0 %", outcome.out)
    assert re.search(r"greedy.*5\.0 %", outcome.out)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "results.json"} <= names
    assert sum(name.endswith(".png") for name in names) == 3
    assert demo.PROMPT in outcome.out
    assert len(re.findall(r"── .*, \d+ tokens/s ──", outcome.out)) == 3
    assert "── dense, weights of int8, " in outcome.out


def test_an_existing_report_is_kept_without_force(teal: Teal, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert teal("demo", MODEL, "--out", tmp_path).is_error("--force")
    assert (tmp_path / "report.html").read_text() == "old"
