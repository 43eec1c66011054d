"""Arguments and options that several verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from teal.quantization import Scheme

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
TablesOption = Annotated[
    Path | None,
    typer.Option(
        "--tables",
        metavar="FOLDER",
        help="TileConfig products on the GPU as tables there say, which teal bench … --tune wrote.",
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option("--quantize", help="Round projections to int8, int4 or fp8 while reading."),
]
QuantizeSeveralOption = Annotated[
    list[str] | None,
    typer.Option(
        "--quantize",
        help="Round projections to int8, int4 or fp8 while reading; none leaves the model as it "
        "is. May be repeated.",
    ),
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option(
        "--group-size", help="Inputs that share a scale, int4 only: 128 (default), 64 or 32."
    ),
]
QuantizeHeadOption = Annotated[
    bool, typer.Option("--quantize-head", help="Round the output head to int8.")
]
QuantizeHeadToo = Annotated[
    bool,
    typer.Option(
        "--quantize-head", help="Round the output head to int8, but not for --quantize none."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]

LONGEST_WINDOW = 2048
# Among several formats, the model as it is.
AS_IT_IS = "none"


def scheme_of(quantize: str | None, group_size: int | None) -> "Scheme | None":
    """Return what `--quantize` and `--group-size` ask for, or `None` for the model as it is.

    Raises:
        UserError: There is no such format or group size, or there are groups of nothing.
    """
    from teal.quantization import Scheme

    if quantize is None:
        require_groups([], group_size)
        return None
    return Scheme(format=quantize, group_size=group_size)


def formats_of(
    quantize: Sequence[str], group_size: int | None, quantize_head: bool
) -> "list[tuple[Scheme | None, bool]]":
    """Return a scheme and whether to round the head for each `--quantize`.

    Args:
        quantize: Formats, or `AS_IT_IS`, of which nothing is rounded; none at all is the model
            with its head rounded if that was asked for.
        group_size: Inputs that share a scale; goes to int4 alone.
        quantize_head: Round the heads.

    Raises:
        UserError: As `scheme_of`.
    """
    from teal.quantization import Scheme

    require_groups(quantize, group_size)
    if not quantize:
        return [(None, quantize_head)]
    return [
        (None, False)
        if name == AS_IT_IS
        else (
            Scheme(format=name, group_size=group_size if name == "int4" else None),
            quantize_head,
        )
        for name in dict.fromkeys(quantize)
    ]


def require_groups(quantize: Sequence[str], group_size: int | None) -> None:
    """Check that a group size has something to be for.

    Raises:
        UserError: No format has groups.
    """
    from teal.foundation.errors import UserError

    if group_size is not None and "int4" not in quantize:
        raise UserError(
            f"A group size of {group_size} was given, and only int4 has groups. Give --quantize "
            "int4 too, or leave --group-size out."
        )


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
