"""What a backend is: something that computes products, and says why when it cannot."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from teal.kernels.operands import Operands, QuantParams


class Backend(Protocol):
    """Computes products on one type of device.

    Attributes:
        name: Name in messages.
    """

    name: str

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str | None:
        """Say why it cannot compute a product, or is not the fastest that can.

        It is asked before every product, so it must be cheap and must not read tensors.

        Args:
            operands: Checked operands on a device of its type, with codes as the weight where
                there is `quant`.
            quant: Decodes the weight; `None` for floats.

        Returns:
            `None` if it can, otherwise a clause such as "numba is not installed".
        """

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        """Compute a product that it can run, as `reference` defines it.

        Args:
            operands: Operands for which `can_run` returns `None`.
            quant: Decodes the weight; `None` for floats.

        Returns:
            (..., N), or (..., N / 2) with an activation, in the dtype of `x`.
        """


class Candidate(Protocol):
    """What any backend has, whatever it computes: `can_run` and `run` take the same tensors."""

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def can_run(self) -> Callable[..., str | None]:
        """Function that returns `None` or the reason why it cannot."""

    @property
    def run(self) -> Callable[..., Tensor]:
        """Function that computes the result."""


class NotInstalled:
    """Takes the place of any backend whose package is missing.

    Attributes:
        name: Name of the missing backend.
        reason: Clause that says what is missing.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    def can_run(self, *_: object) -> str:
        """Return the reason."""
        return self.reason

    def run(self, *_: object, **__: object) -> Tensor:
        """Fail: it is never chosen."""
        raise NotImplementedError(self.reason)
