from dataclasses import replace
from pathlib import Path

import pytest

from teal.benchmark.bytes_read import WeightsRead
from teal.benchmark.decode import DecodeResult, Start
from teal.benchmark.gemv import GemvResult
from teal.benchmark.model_configs import Shape
from teal.benchmark.plot import save_decode_plot, save_plot
from teal.benchmark.timing import Timing


def test_each_product_has_a_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timing = Timing(median=2.0, low=1.0, high=3.0)
    first = GemvResult(
        shape=Shape(form="plain", in_features=64, output_sizes=(48,)),
        dtype="bfloat16",
        rows=1,
        sparsity=0.5,
        read=0.5,
        error=0.0,
        dense=timing,
        sparse=timing,
        baseline=None,
        limit=1.0,
        bandwidth=1e9,
    )
    second = replace(first, shape=Shape(form="gated", in_features=64, output_sizes=(48, 48)))
    save_plot([first, replace(first, sparsity=0.8), second], tmp_path / "plot.svg")
    drawing = (tmp_path / "plot.svg").read_text()
    assert drawing.count('id="axes_') == 2


def test_each_model_has_a_panel_with_its_formats_and_baselines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ours = DecodeResult(
        model="first",
        runner="teal",
        dtype="bfloat16",
        weights=WeightsRead(format="int8"),
        prompt_tokens=4,
        new_tokens=8,
        sparsity=0.5,
        effective_sparsity=0.51,
        token=Timing(median=2.0, low=1.0, high=3.0),
        read=100,
        bandwidth=1e9,
        speed_up=1.0,
        start=Start(seconds=0.5, bytes=None),
    )
    baseline = replace(ours, runner="transformers", sparsity=0.0, effective_sparsity=0.0)
    floats = replace(ours, weights=WeightsRead())
    save_decode_plot([ours, floats, baseline, replace(ours, model="second")], tmp_path / "plot.svg")
    drawing = (tmp_path / "plot.svg").read_text()
    assert drawing.count('id="axes_') == 2
    for line in ("transformers", "teal, int8", "teal, float", "limit of memory"):
        assert f"<!-- {line} -->" in drawing
