"""The report as one HTML file that needs nothing beside it."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from teal.foundation.artifact import write_bytes, write_text
from teal.foundation.formatting import percent, with_error
from teal.foundation.version import __version__
from teal.report.rows import DenseRow, Sample, SparseRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "report.html"

_COLUMNS = (
    "strategy", "target sparsity", "effective sparsity", "perplexity", "against dense",
    "KL (nats)", "top-1 agreement",
)  # fmt: skip

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --ink: #1f2328; --muted: #656d76; --line: #d8dee4; --page: #ffffff; --card: #f6f8fa;
  --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --muted: #9198a1; --line: #30363d; --page: #0d1117; --card: #161b22;
    --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 3rem;
  background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { margin: 0 0 1.25rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0; }
dt, .muted, footer { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: 8px;
  background: #ffffff; }
img { display: block; width: 100%; min-width: 36rem; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1rem; }
article { padding: 1rem; border-radius: 8px; background: var(--card); }
pre { margin: 0; font: .85rem/1.5 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre b { color: var(--accent); font-weight: 400; }
footer { margin-top: 3rem; font-size: .85rem; }
@media (max-width: 36rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
</style>
</head>
<body>
<h1>$title</h1>
<dl>
$summary
</dl>
<h2>Results</h2>
<div class="wide"><table>
$table
</table></div>
$figures
$samples
<footer>teal $version</footer>
</body>
</html>
""")


def write_report(
    folder: Path,
    *,
    title: str,
    summary: Mapping[str, str],
    dense: DenseRow,
    rows: Sequence[SparseRow],
    figures: "Mapping[str, Figure]",
    samples: Sequence[Sample],
) -> Path:
    """Write `report.html`, with all figures inside, and each figure as `{name}.png`.

    Args:
        folder: Destination; files of these names in it are replaced, each at once.
        title: Heading of the page.
        summary: What was run, as label → value.
        dense: Result of the dense model.
        rows: Results of the plans.
        figures: Plots by file name; a name such as "perplexity-against-sparsity" is also a heading.
        samples: Texts that the model wrote.

    Returns:
        Path of `report.html`.
    """
    images = {name: _png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        write_bytes(folder / f"{name}.png", image)
    page = _PAGE.substitute(
        title=escape(title),
        summary="\n".join(
            f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in summary.items()
        ),
        table=_table(dense, rows),
        figures="\n".join(_figure(name, image) for name, image in images.items()),
        samples=_samples(samples),
        version=escape(__version__),
    )
    write_text(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # Without the name of the drawing library: the same figure gives the same bytes everywhere.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _table(dense: DenseRow, rows: Sequence[SparseRow]) -> str:
    perplexity = with_error(dense.perplexity, dense.perplexity_error)
    lines = [["dense", "", "", perplexity, "", "", ""]]
    lines += [
        [
            row.strategy,
            percent(row.target_sparsity),
            percent(row.effective_sparsity),
            with_error(row.perplexity, row.perplexity_error),
            f"{100 * (row.perplexity / dense.perplexity - 1):+.1f} %",
            f"{row.kl:.4f}",
            percent(row.top1_agreement),
        ]
        for row in rows
    ]
    return "\n".join([_line("th", _COLUMNS), *(_line("td", line) for line in lines)])


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(name: str, image: bytes) -> str:
    heading = escape(name.replace("-", " ").capitalize())
    source = f"data:image/png;base64,{b64encode(image).decode()}"
    return f'<h2>{heading}</h2>\n<figure class="wide"><img alt="{heading}" src="{source}"></figure>'


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    articles = "\n".join(_sample(sample) for sample in samples)
    return f'<h2>Samples</h2>\n<div class="samples">\n{articles}\n</div>'


def _sample(sample: Sample) -> str:
    speed = ""
    if sample.tokens_per_second is not None:
        speed = f' <span class="muted">{sample.tokens_per_second:.1f} tokens/s</span>'
    return (
        f"<article><h3>{escape(sample.title)}{speed}</h3>"
        f"<pre>{escape(sample.prompt)}<b>{escape(sample.continuation)}</b></pre></article>"
    )
