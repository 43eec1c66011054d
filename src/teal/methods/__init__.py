"""Methods that choose which activations are dropped: one file per published method."""

from teal.foundation.errors import unknown_name
from teal.methods.base import MaskRule, Method, ScoreQuantiles
from teal.methods.teal import Teal

__all__ = ["METHODS", "MaskRule", "Method", "ScoreQuantiles", "method_named", "register_method"]

METHODS: dict[str, Method] = {"teal": Teal()}


def register_method(method: Method) -> None:
    """Make `method` available under its name.

    Args:
        method: Instance of the method; its `name` must be new.

    Raises:
        ValueError: The name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"A method named {method.name!r} is already registered.")
    METHODS[method.name] = method


def method_named(name: str) -> Method:
    """Return the registered method `name`.

    Raises:
        UserError: There is none.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]
