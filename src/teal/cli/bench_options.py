"""What the verbs of `teal bench` share: options, and how records are printed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from teal.cli.console import print_json

if TYPE_CHECKING:
    import torch

BenchDtypeOption = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]
CommitOption = Annotated[
    str | None, typer.Option("--commit", help="Commit to record where git cannot tell it.")
]


class Record(Protocol):
    """A measurement with a JSON form."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        ...


def bench_dtype(name: str) -> "torch.dtype":
    """Return the dtype to measure in.

    Raises:
        UserError: There is no such dtype, or it is "auto".
    """
    import torch

    from teal.foundation.errors import UserError
    from teal.models.placement import resolve_dtype

    dtype = resolve_dtype(name)
    if not isinstance(dtype, torch.dtype):
        raise UserError("Give a --dtype to compare in: bfloat16, float16 or float32.")
    return dtype


def print_records(
    records: Sequence[Record], bandwidth: float, device: "torch.device", commit: str | None
) -> None:
    """Print measurements as JSON, with the machine that they were made on."""
    from teal.benchmark.environment import describe_machine

    print_json(
        {
            "machine": describe_machine(device, commit),
            "bandwidth": bandwidth,
            "results": [record.to_dict() for record in records],
        }
    )
