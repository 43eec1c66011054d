import base64
import re
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from teal.foundation.errors import MissingExtraError
from teal.report import DenseRow, Sample, SparseRow, write_report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
VOID_TAGS = {"meta", "img"}
HOSTILE = "<script>alert('a & b')</script>\"{{ title }}"
ESCAPED = "&lt;script&gt;alert(&#39;a &amp; b&#39;)&lt;/script&gt;&#34;{{ title }}"


class Nesting(HTMLParser):
    """Follows which elements are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def drawing() -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    return figure


def report(folder: Path, **changes: Any) -> str:
    """Write a report, all of it harmless but for `changes`, and return the page."""
    rows = [
        SparseRow(
            strategy=strategy,
            target_sparsity=target,
            effective_sparsity=target - 0.013,
            perplexity=perplexity,
            perplexity_error=error,
            kl=0.0421,
            top1_agreement=0.873,
        )
        for strategy, target, perplexity, error in [
            ("uniform", 0.4, 9.0, None),
            ("greedy", 0.5, 8.5, 0.15),
        ]
    ]
    content: dict[str, Any] = {
        "title": "Title",
        "summary": {"Model": "llama"},
        "dense": DenseRow(perplexity=8.0, perplexity_error=0.125),
        "rows": rows,
        "figures": {"first-plot": drawing()},
        "samples": [Sample(title="dense", prompt="def f(", continuation="x):")],
    }
    path = write_report(folder, **(content | changes))
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def parsed(page: str) -> Nesting:
    nesting = Nesting()
    nesting.feed(page)
    nesting.close()
    return nesting


def cells(page: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", line) for line in lines if "<td>" in line]


def test_page_is_one_file_without_network_or_scripts(tmp_path: Path) -> None:
    page = report(tmp_path)
    nesting = parsed(page)
    assert nesting.references
    assert all(reference.startswith("data:image/png;base64,") for reference in nesting.references)
    assert not {"script", "link", "iframe"} & set(nesting.seen)
    assert not re.search(r"https?://|url\(|@import", page)


def test_report_without_jinja2_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("teal.report", "jinja2")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"^The report needs .*'jinja2'.*'teal\[report\]'$"):
        import_module("teal.report")


def test_every_element_is_closed(tmp_path: Path) -> None:
    assert parsed(report(tmp_path)).open == []


def test_figures_are_png_files_and_embedded_unchanged(tmp_path: Path) -> None:
    page = report(tmp_path, figures={"first-plot": drawing(), "second-plot": drawing()})
    inside = [base64.b64decode(source.split(",")[1]) for source in parsed(page).references]
    files = [(tmp_path / f"{name}-plot.png").read_bytes() for name in ("first", "second")]
    assert inside == files
    assert all(image.startswith(PNG_SIGNATURE) for image in files)


def test_png_files_do_not_name_the_drawing_library(tmp_path: Path) -> None:
    report(tmp_path)
    assert b"matplotlib" not in (tmp_path / "first-plot.png").read_bytes()


def test_figure_name_becomes_heading_and_alt_text(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert "<h2>First plot</h2>" in page
    assert 'alt="First plot"' in page


def test_table_shows_every_number_of_every_row(tmp_path: Path) -> None:
    assert cells(report(tmp_path)) == [
        ["dense", "", "", "8.000 ± 0.125", "", "", ""],
        ["uniform", "40.0 %", "38.7 %", "9.000", "+12.5 %", "0.0421", "87.3 %"],
        ["greedy", "50.0 %", "48.7 %", "8.500 ± 0.150", "+6.2 %", "0.0421", "87.3 %"],
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"title": HOSTILE},
        {"summary": {HOSTILE: "value"}},
        {"summary": {"label": HOSTILE}},
        {"samples": [Sample(title=HOSTILE, prompt="", continuation="")]},
        {"samples": [Sample(title="", prompt=HOSTILE, continuation="")]},
        {"samples": [Sample(title="", prompt="", continuation=HOSTILE)]},
    ],
    ids=["title", "label", "value", "sample title", "prompt", "continuation"],
)
def test_markup_in_text_is_escaped(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    page = report(tmp_path, **changes)
    assert ESCAPED in page
    assert "script" not in parsed(page).seen


def test_markup_in_a_strategy_is_escaped(tmp_path: Path) -> None:
    row = SparseRow(
        strategy=HOSTILE,
        target_sparsity=0.5,
        effective_sparsity=0.5,
        perplexity=9.0,
        kl=0.1,
        top1_agreement=0.9,
    )
    assert cells(report(tmp_path, rows=[row]))[1][0] == ESCAPED


def test_sample_keeps_line_breaks_and_highlights_the_continuation(tmp_path: Path) -> None:
    sample = Sample(title="greedy", prompt="a\n  b", continuation="\n\nc")
    assert "<pre>a\n  b<b>\n\nc</b></pre>" in report(tmp_path, samples=[sample])


def test_speed_of_a_sample_is_shown_only_if_measured(tmp_path: Path) -> None:
    fast = Sample(title="greedy", prompt="a", continuation="b", tokens_per_second=81.26)
    slow = Sample(title="dense", prompt="a", continuation="b")
    page = report(tmp_path, samples=[fast, slow])
    assert "81.3 tokens/s" in page
    assert page.count("tokens/s") == 1


def test_report_without_samples_has_no_samples_heading(tmp_path: Path) -> None:
    assert "Samples" not in report(tmp_path, samples=[])


def test_report_is_reproducible_and_replaces_the_old_one(tmp_path: Path) -> None:
    assert report(tmp_path) == report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first-plot.png", "report.html"]
