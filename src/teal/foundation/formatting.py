"""Formatting of numbers for people, in tables and reports."""


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f} %"


def format_name(weight_format: str, group_size: int | None = None) -> str:
    """Return a weight format, followed by its group size if it has one."""
    return f"{weight_format}/{group_size}" if group_size else weight_format


def with_error(value: float, error: float | None) -> str:
    """Return a value with its standard error, if there is one."""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
