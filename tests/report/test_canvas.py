import sys
from importlib import import_module

import pytest

from teal.foundation.errors import MissingExtraError
from teal.report.canvas import new_figure


def test_report_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("teal.report", "matplotlib")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"^The report needs .*'teal\[report\]'$"):
        import_module("teal.report")


def test_all_figures_have_the_same_width() -> None:
    low, high = new_figure(1.0).get_size_inches(), new_figure(9.0).get_size_inches()
    assert low[0] == high[0]
    assert (low[1], high[1]) == (1.0, 9.0)
