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
        help="Use the tile configurations that teal bench … --tune wrote to this folder.",
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option("--quantize", help="Quantize projections to int8, int4 or fp8 while loading."),
]
QuantizeSeveralOption = Annotated[
    list[str] | None,
    typer.Option(
        "--quantize",
        help="Quantize projections to int8, int4 or fp8 while loading; none leaves the model as it "
        "is. May be repeated.",
    ),
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option(
        "--group-size", help="Input channels per scale, int4 only: 128 (default), 64 or 32."
    ),
]
QuantizeHeadOption = Annotated[
    bool, typer.Option("--quantize-head", help="Quantize the output head to int8.")
]
QuantizeHeadToo = Annotated[
    bool,
    typer.Option(
        "--quantize-head",
        help="Quantize the output head to int8, except with --quantize none.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]

LONGEST_WINDOW = 2048
# The value of --quantize that leaves the model as it is.
AS_IT_IS = "none"


def fractions_of(text: str) -> list[float]:
    """Read sparsities that are separated by commas.

    Raises:
        UserError: `text` is something else, or a sparsity is outside [0, 1).
    """
    from teal.foundation.errors import UserError, check_sparsity

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"Sparsity {text!r} is not a list of fractions. Give, for example, 0.4,0.5."
        ) from None
    return [check_sparsity(number) for number in numbers]


def scheme_of(quantize: str | None, group_size: int | None) -> "Scheme | None":
    """Return what `--quantize` and `--group-size` ask for, or `None` for the model as it is.

    Raises:
        UserError: The format or group size is unknown, or a group size was given without int4.
    """
    from teal.quantization import Scheme

    if quantize is None:
        require_groups([], group_size)
        return None
    return Scheme(format=quantize, group_size=group_size)


def formats_of(
    quantize: Sequence[str], group_size: int | None, quantize_head: bool
) -> "list[tuple[Scheme | None, bool]]":
    """Return a scheme, and whether to quantize the head, for each `--quantize`.

    Args:
        quantize: Formats, or `AS_IT_IS`, with which nothing is quantized. If empty, the result is
            the float model alone, its head quantized if `quantize_head` is set.
        group_size: Input channels per scale; applies to int4 only.
        quantize_head: Quantize the head as well.

    Raises:
        UserError: A format or the group size is unknown, or a group size was given without int4.
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
    """Check that a group size comes with a format that has groups.

    Raises:
        UserError: It does not.
    """
    from teal.foundation.errors import UserError

    if group_size is not None and "int4" not in quantize:
        raise UserError(
            f"A group size of {group_size} was given, but only int4 has groups. Give --quantize "
            "int4 too, or leave --group-size out."
        )


def resolve_sequence_length(asked: int | None, context: int) -> int:
    """Return the window length: the one asked for, or the default for this context.

    Raises:
        UserError: The length exceeds the model's context.
    """
    from teal.foundation.errors import UserError

    if asked is not None and asked > context:
        raise UserError(
            f"Sequence length {asked} is longer than the model's context of {context} tokens. "
            f"Give at most {context}."
        )
    return asked or min(LONGEST_WINDOW, context)
