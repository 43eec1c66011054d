"""`teal calibrate`: measures a model's activations on a text."""

from pathlib import Path
from typing import Annotated

import typer

from teal.cli.console import progress_bar, quiet_libraries, say
from teal.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    GroupSizeOption,
    ModelArgument,
    QuantizeOption,
    SequenceLengthOption,
    TextOption,
    resolve_sequence_length,
    scheme_of,
)

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal calibrate models/py-16m --text code.txt --out stats

teal calibrate meta-llama/Llama-3.1-8B --text hf:HuggingFaceFW/fineweb-edu:sample-10BT:train
--out stats --device cuda
"""


@app.command(epilog=EXAMPLES)
def command(
    model: ModelArgument,
    text: TextOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the statistics.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to measure on.")] = 20480,
    offset: Annotated[int, typer.Option("--offset", help="Tokens of the text to skip.")] = 0,
    sequence_length: SequenceLengthOption = None,
    quantize: QuantizeOption = None,
    group_size: GroupSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
) -> None:
    """Measure the activations of every projection on a text.

    The model runs block by block: only one block at a time is on the device. Statistics measured
    with --quantize, and plans made from them, are for weights of that format.
    """
    from teal.calibration import calibrate
    from teal.compression import quantize_model
    from teal.data import token_windows
    from teal.foundation.artifact import check_destination
    from teal.models.loading import context_length, load_model, load_tokenizer
    from teal.models.placement import resolve_device

    quiet_libraries()
    scheme = scheme_of(quantize, group_size)
    check_destination(out, "stats", force=force, inputs=(model, text))
    target = resolve_device(device)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device="cpu")
    length = resolve_sequence_length(sequence_length, context_length(loaded.config))
    windows = token_windows(
        text, tokenizer, sequence_length=length, num_tokens=tokens, offset=offset
    )
    if scheme:
        quantize_model(loaded, scheme, device=target, progress=progress_bar)
    stats = calibrate(loaded, windows, device=target, progress=progress_bar)
    stats.save(out, force=force)
    say(
        f"Measured {len(stats.inputs)} inputs of {len(stats.model.shapes)} projections on "
        f"{windows.provenance.num_tokens} tokens: {out}"
    )
