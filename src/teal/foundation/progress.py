"""The interface by which long-running functions report progress."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Wraps the items of a loop; the command line passes one that draws a progress bar."""

    def __call__(self, items: Sequence[Item], description: str) -> Iterator[Item]:
        """Yield `items` in order while showing `description`."""
        ...


def silent(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield `items` and show nothing."""
    del description
    return iter(items)
