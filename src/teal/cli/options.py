"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, or a name on the Hugging Face hub.")
]
TextOption = Annotated[
    str,
    typer.Option(
        "--text", help="UTF-8 text file, or a data set as hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."
    ),
]
OptionalTextOption = Annotated[
    str | None,
    typer.Option("--text", help="UTF-8 text file, or a data set as hf:NAME[:CONFIG]:SPLIT."),
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        help="Tokens per window; by default the smaller of 2048 and the model's context.",
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="Plan folder; without it the model stays dense.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda; auto is CUDA where present.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto, float32, bfloat16 or float16; auto is the checkpoint's own."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]

LONGEST_WINDOW = 2048


def resolve_sequence_length(asked: int | None, context: int) -> int:
    """Return the window length: what was asked for, or the default for this context.

    Raises:
        UserError: More was asked for than the model's context holds.
    """
    from teal.foundation.errors import UserError

    if asked is not None and asked > context:
        raise UserError(
            f"Sequence length {asked} is longer than the model's context of {context} tokens. "
            f"Give at most {context}."
        )
    return asked or min(LONGEST_WINDOW, context)
