"""How numbers are shown to people, in tables and on pages alike."""


def percent(fraction: float) -> str:
    """Show a fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f} %"


def with_error(value: float, error: float | None) -> str:
    """Show a value with its standard error."""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
