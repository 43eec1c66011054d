"""`teal quantize`: writes a model with weights of 8 or 4 bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal.cli.console import print_json, print_table, progress_bar, quiet_libraries
from teal.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    GroupSizeOption,
    JsonOption,
    ModelArgument,
    OptionalTextOption,
    SequenceLengthOption,
    resolve_sequence_length,
)

if TYPE_CHECKING:
    from teal.quantization import QuantizedWeight

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal quantize models/py-16m --format int8 --out model-int8

teal quantize meta-llama/Llama-3.1-8B --format int4 --method gptq
--text hf:HuggingFaceFW/fineweb-edu:sample-10BT:train --device cuda --out model-int4
"""

METHODS = ("gptq", "rtn")


@app.command(epilog=EXAMPLES)
def command(
    model: ModelArgument,
    weight_format: Annotated[str, typer.Option("--format", help="int8, int4 or fp8.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the quantized model.")],
    group_size: GroupSizeOption = None,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric",
            help="Give each int4 group its own zero point: closer to the weights, but transformers "
            "opens the folder only with dequantize=True.",
        ),
    ] = False,
    method: Annotated[
        str, typer.Option("--method", help="rtn rounds to the nearest value; gptq needs --text.")
    ] = "rtn",
    text: OptionalTextOption = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Tokens of --text that gptq uses.")
    ] = 131072,
    sequence_length: SequenceLengthOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Quantize the projections of a model and write a folder that transformers can open too.

    The folder has the compressed-tensors layout.
    """
    from teal.compression import QUANTIZATION, quantize_model, save_quantized
    from teal.data import token_windows
    from teal.foundation.artifact import check_destination
    from teal.models.loading import context_length, load_model, load_tokenizer
    from teal.models.placement import resolve_device
    from teal.quantization import Scheme

    quiet_libraries()
    scheme = Scheme(format=weight_format, group_size=group_size, symmetric=not asymmetric)
    check_method(method, text)
    check_destination(out, QUANTIZATION, force=force, inputs=(model, text))
    target = resolve_device(device)
    require_dense_checkpoint(model)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device="cpu")
    windows = None
    if text is not None:
        length = resolve_sequence_length(sequence_length, context_length(loaded.config))
        windows = token_windows(text, tokenizer, sequence_length=length, num_tokens=tokens)
    weights = quantize_model(loaded, scheme, windows, device=target, progress=progress_bar)
    save_quantized(out, loaded, tokenizer, weights, scheme, tokens=windows, force=force)
    summary = {"format": scheme.format, "group_size": scheme.group_size, "method": method}
    report = summary | sizes_of(weights, loaded.dtype.itemsize)
    if json:
        print_json(report)
    else:
        print_report(report, out)


def check_method(method: str, text: str | None) -> None:
    """Check that the method is known and that a text is given exactly when it needs one.

    Raises:
        UserError: One of these does not hold.
    """
    from teal.foundation.errors import UserError, unknown_name

    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if (method == "gptq") != (text is not None):
        raise UserError(
            "The method gptq measures activations on a text, and rtn needs none. "
            "Give --text with --method gptq, and only then."
        )


def require_dense_checkpoint(source: str) -> None:
    """Check that a model is not quantized.

    Raises:
        UserError: Its configuration says that it is.
    """
    from teal.checkpoints.location import load_config
    from teal.foundation.errors import UserError

    if getattr(load_config(source), "quantization_config", None) is not None:
        raise UserError(
            f"{source!r} is quantized already. Quantize the dense model that it came from."
        )


def sizes_of(weights: "Mapping[str, QuantizedWeight]", dense_itemsize: int) -> dict[str, Any]:
    """Return the bytes of all projections before and after, scales and zeros included."""
    numbers = sum(weight.in_features * weight.out_features for weight in weights.values())
    quantized = sum(weight.bytes for weight in weights.values())
    return {
        "projections": len(weights),
        "bytes_dense": numbers * dense_itemsize,
        "bytes_quantized": quantized,
        "bits_per_weight": 8 * quantized / numbers,
    }


def print_report(report: Mapping[str, Any], out: Path) -> None:
    """Print one row with the sizes of the projections, under the name of the folder."""
    columns = ["", "method", "projections", "dense", "quantized", "bits per weight"]
    row = [
        report["format"],
        report["method"],
        str(report["projections"]),
        megabytes(report["bytes_dense"]),
        megabytes(report["bytes_quantized"]),
        f"{report['bits_per_weight']:.2f}",
    ]
    print_table(str(out), columns, [row])


def megabytes(count: int) -> str:
    """Format bytes in millions."""
    return f"{count / 1e6:.1f} MB"
