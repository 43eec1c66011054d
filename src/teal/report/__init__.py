"""Shows the results of a run: plots, and one HTML page with everything."""

from teal.report.page import write_report
from teal.report.plots import figures, histogram_figure, perplexity_figure, sparsity_figure
from teal.report.rows import DenseRow, Sample, SparseRow

__all__ = [
    "DenseRow",
    "Sample",
    "SparseRow",
    "figures",
    "histogram_figure",
    "perplexity_figure",
    "sparsity_figure",
    "write_report",
]
