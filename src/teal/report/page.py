"""The report as one HTML file that needs nothing beside it."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teal.foundation.artifact import write_bytes, write_text
from teal.foundation.errors import MissingExtraError
from teal.foundation.formatting import percent, with_error
from teal.foundation.version import __version__
from teal.report.rows import DenseRow, Sample, SparseRow

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as error:
    raise MissingExtraError("The report", "jinja2", "report") from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "report.html"

_TEMPLATE = "report.html.j2"


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
    """Write `report.html`, with all figures embedded, and each figure as `{name}.png`.

    Args:
        folder: Destination; files of these names in it are replaced, each atomically.
        title: Heading of the page.
        summary: What was run, as label → value.
        dense: Result of the dense model.
        rows: Results of the plans.
        figures: Plots by file name; a name such as "perplexity-against-sparsity" is also a heading.
        samples: Texts that the model generated.

    Returns:
        Path of `report.html`.
    """
    images = {name: _png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        write_bytes(folder / f"{name}.png", image)
    page = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            title=title,
            summary=summary,
            dense=dense,
            rows=rows,
            images={name: _data_uri(image) for name, image in images.items()},
            samples=samples,
            version=__version__,
        )
    )
    write_text(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("teal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "with_error": with_error}
    return environment


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # Without the name of the drawing library: the same figure gives the same bytes everywhere.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
