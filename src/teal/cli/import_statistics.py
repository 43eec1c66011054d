"""`teal import`: makes statistics from the histograms that TEAL published."""

from pathlib import Path
from typing import Annotated

import typer

from teal.cli.console import say
from teal.cli.options import ForceOption

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal import TEAL/models/Llama-3-8B --config Llama-3-8B/config.json --out stats

teal import TEAL/models/Mistral-7B --config Mistral-7B/config.json --out stats --force
"""


@app.command(epilog=EXAMPLES)
def command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that contains histograms/layer-N/….")
    ],
    config: Annotated[Path, typer.Option("--config", help="The model's config.json.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the statistics.")],
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="Import the layers that are present if some are missing."
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Import activation histograms in the format of github.com/FasterDecoding/TEAL."""
    from teal.calibration import import_teal
    from teal.foundation.artifact import check_destination

    check_destination(out, "stats", force=force, inputs=(folder, config))
    stats = import_teal(folder, config, allow_missing=allow_missing)
    stats.save(out, force=force)
    say(f"Imported {len(stats.inputs)} inputs of {len(stats.model.shapes)} projections: {out}")
