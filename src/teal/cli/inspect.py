"""`teal inspect`: shows the content of statistics or of a plan."""

from pathlib import Path
from typing import Annotated, Any

import typer

from teal.calibration import CalibrationStats
from teal.calibration.input_statistics import InputStatistics
from teal.cli.console import print_json, print_table, say
from teal.cli.options import JsonOption
from teal.foundation.errors import UserError
from teal.foundation.formatting import percent
from teal.foundation.provenance import TextProvenance
from teal.plan import PlannedProjection, SparsityPlan
from teal.quantization import FLOAT

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal inspect plan

teal inspect stats --json
"""

QUANTILES = (0.25, 0.5, 0.75, 0.9)


@app.command(epilog=EXAMPLES)
def command(
    artifact: Annotated[
        Path, typer.Argument(metavar="STATS|PLAN", help="Folder of statistics or of a plan.")
    ],
    json: JsonOption = False,
) -> None:
    """Show the content of statistics or of a plan."""
    if (artifact / "plan.json").exists():
        _show_plan(SparsityPlan.load(artifact), json)
    elif (artifact / "stats.json").exists():
        _show_stats(CalibrationStats.load(artifact), json)
    else:
        raise UserError(
            f"{str(artifact)!r} holds neither plan.json nor stats.json. "
            "Give a folder that teal allocate or teal calibrate wrote."
        )


def _show_plan(plan: SparsityPlan, json: bool) -> None:
    header = {
        "model_type": plan.model.model_type,
        "method": plan.method,
        "strategy": plan.strategy,
        "target_sparsity": plan.target_sparsity,
        "sparsity_budget": plan.sparsity_budget,
        "path": plan.path.to_dict() if plan.path else None,
        "dtype": plan.dtype,
        "weight_format": plan.weight_format,
        "calibration": plan.calibration.to_dict(),
        "library_version": plan.library_version,
    }
    if json:
        projections = {
            name: {
                "target_sparsity": planned.target_sparsity,
                "threshold": planned.rule.threshold if planned.rule else None,
                "weight_size": plan.model.weight_size(name),
            }
            for name, planned in plan.projections.items()
        }
        print_json(header | {"projections": projections})
        return
    say(
        f"{plan.method} plan for a {plan.model.model_type} model, {plan.strategy}, target sparsity "
        f"{percent(plan.target_sparsity)}, budget {percent(plan.sparsity_budget)}"
    )
    if plan.path:
        say(f"path: any sparsity from 0 to {percent(plan.path.end)} without a new plan")
    else:
        say("path: none, so no other sparsity without a new plan")
    say(_describe(plan.calibration, plan.dtype, plan.weight_format))
    rows = [_plan_row(name, planned) for name, planned in plan.projections.items()]
    print_table("", ["projection", "target sparsity", "threshold"], rows)


def _plan_row(name: str, planned: PlannedProjection) -> list[str]:
    threshold = f"{planned.rule.threshold:.5g}" if planned.rule else "dense"
    return [name, percent(planned.target_sparsity), threshold]


def _show_stats(stats: CalibrationStats, json: bool) -> None:
    if json:
        print_json(
            {
                "model_type": stats.model.model_type,
                "dtype": stats.dtype,
                "weight_format": stats.weight_format,
                "text": stats.text.to_dict(),
                "library_version": stats.library_version,
                "paths": {name: path.settings for name, path in stats.paths.items()},
                "inputs": {name: _input_content(entry) for name, entry in stats.inputs.items()},
            }
        )
        return
    say(f"statistics of a {stats.model.model_type} model, {len(stats.model.shapes)} projections")
    say(_describe(stats.text, stats.dtype, stats.weight_format))
    for name, path in stats.paths.items():
        say(f"path {name}: {path.settings}")
    rows = [
        [name, str(entry.in_features), str(entry.count)]
        + [f"{entry.quantile(sparsity):.4g}" for sparsity in QUANTILES]
        for name, entry in stats.inputs.items()
    ]
    columns = ["input", "channels", "tokens", *(f"|x| at {percent(s)}" for s in QUANTILES)]
    print_table("", columns, rows)


def _input_content(entry: InputStatistics) -> dict[str, Any]:
    return {
        "projections": list(entry.projections),
        "in_features": entry.in_features,
        "count": entry.count,
        "quantiles": {str(sparsity): entry.quantile(sparsity) for sparsity in QUANTILES},
    }


def _describe(text: TextProvenance, dtype: str, weight_format: str) -> str:
    weights = "" if weight_format == FLOAT else f" with {weight_format} weights"
    return (
        f"calibrated in {dtype}{weights} on {text.num_tokens} tokens from {text.offset} on, "
        f"windows of {text.sequence_length}: {text.source}"
    )
