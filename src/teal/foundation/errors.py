"""Errors that a user can cause; each message names the cure."""

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """Bad input; the message says what was given, what is allowed and what to do."""


class MissingExtraError(ImportError):
    """An optional package that a feature needs is not installed.

    Args:
        feature: Feature, for the message.
        package: Name of the missing package.
        extra: Extra of this library that installs the package.
    """

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}. Install it with: pip install 'teal[{extra}]'"
        )


def unknown_name(kind: str, given: str, known: Collection[str]) -> UserError:
    """Build the error for a name that is not in a registry.

    Args:
        kind: Kind of name, such as "strategy".
        given: Name that was asked for.
        known: All registered names.

    Returns:
        An error that names the closest and all known names.
    """
    closest = difflib.get_close_matches(given, known, n=1)
    hint = f" Did you mean {closest[0]!r}?" if closest else ""
    return UserError(f"Unknown {kind} {given!r}.{hint} Known: {', '.join(sorted(known))}.")


def check_sparsity(sparsity: float, what: str = "Sparsity") -> float:
    """Return `sparsity` if it is a number in [0, 1).

    Args:
        sparsity: Number to check.
        what: Meaning of the number, for the message.

    Raises:
        UserError: The number is out of range.
    """
    if not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise UserError(
            f"{what} {sparsity!r} is outside [0, 1). Give a fraction such as 0.5 for 50 %."
        )
    return float(sparsity)
