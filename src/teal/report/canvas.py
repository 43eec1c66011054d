"""The look of all plots, drawn without pyplot and its global state."""

from teal.foundation.errors import MissingExtraError

try:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise MissingExtraError("The report", "matplotlib", "report") from error

# Okabe and Ito's colours, distinguishable with every kind of colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
INK, GREY, PALE = "#262626", "#737373", "#dcdcdc"

# In inches; all figures have the same width, so that their text has the same size on a page.
_WIDTH = 9.0
_DPI = 160


def new_figure(height: float) -> Figure:
    """Return an empty figure of the common width and `height` inches."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quieten(axes: Axes, *hidden: str) -> None:
    """Remove from `axes` what is not data: top, right and `hidden` spines, and tick marks."""
    axes.spines[["top", "right", *hidden]].set_visible(False)
    axes.spines[:].set_color(PALE)
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)


def show_percent(axis: Axis) -> None:
    """Label an axis of fractions with percentages."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
