"""How numbers are shown to people, in tables and on pages alike."""


def percent(fraction: float) -> str:
    """Show a fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f} %"


def format_name(weight_format: str, group_size: int | None = None) -> str:
    """Show a format of weights, with its group size where it has one."""
    return f"{weight_format}/{group_size}" if group_size else weight_format


def with_error(value: float, error: float | None) -> str:
    """Show a value with its standard error."""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
