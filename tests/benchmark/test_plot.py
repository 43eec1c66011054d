from dataclasses import replace
from pathlib import Path

import pytest

from teal.benchmark.gemv import GemvResult
from teal.benchmark.plot import save_plot
from teal.benchmark.shapes import Shape
from teal.benchmark.timer import Timing


def test_every_product_has_a_panel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timing = Timing(median=2.0, low=1.0, high=3.0)
    first = GemvResult(
        shape=Shape(form="plain", in_features=64, widths=(48,)),
        dtype="bfloat16",
        rows=1,
        sparsity=0.5,
        read=0.5,
        error=0.0,
        dense=timing,
        sparse=timing,
        peer=None,
        limit=1.0,
        bandwidth=1e9,
    )
    second = replace(first, shape=Shape(form="gated", in_features=64, widths=(48, 48)))
    save_plot([first, replace(first, sparsity=0.8), second], tmp_path / "plot.svg")
    drawing = (tmp_path / "plot.svg").read_text()
    assert drawing.count('id="axes_') == 2
