"""`teal allocate`: makes a plan from statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from teal.allocation import (
    STRATEGIES,
    GreedySettings,
    allocate,
    greedy_path,
    search_sparsity,
    strategy_named,
)
from teal.calibration import CalibrationStats
from teal.cli.console import progress_bar, quiet_libraries, say
from teal.cli.evaluate import PAPER_SPARSE_FROM
from teal.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    GroupSizeOption,
    OptionalTextOption,
    QuantizeOption,
    SequenceLengthOption,
    resolve_sequence_length,
    scheme_of,
)
from teal.compression import quantize_model
from teal.data import TokenWindows, check_no_overlap, token_windows
from teal.evaluation import evaluate
from teal.foundation.artifact import check_destination
from teal.foundation.errors import UserError
from teal.foundation.formatting import percent
from teal.foundation.provenance import TextProvenance
from teal.methods import METHODS, method_named
from teal.models.families import identity_of
from teal.models.weight_format import weight_format_of
from teal.plan import SparsityPlan
from teal.quantization import Scheme

app = typer.Typer(add_completion=False)

DEFAULTS = GreedySettings()
EXAMPLES = """Examples:

teal allocate stats --sparsity 0.5 --out plan

teal allocate stats --sparsity 0.5 --strategy greedy --model models/py-16m --text code.txt
--out plan
"""


@app.command(epilog=EXAMPLES)
def command(
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="Statistics folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the plan.")],
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Sparsity budget in [0, 1).")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(
            "--max-perplexity-increase",
            help="Instead of --sparsity: find the highest sparsity that raises perplexity on "
            "--text by at most this fraction.",
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", help=f"One of {', '.join(STRATEGIES)}.")
    ] = "uniform",
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(METHODS)}.")] = "teal",
    target_modules: Annotated[
        str | None,
        typer.Option(
            "--target-modules",
            help="Projections to plan, separated by commas: suffixes such as down_proj, or regular "
            "expressions. All by default.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model folder or hub name, if the model has to run."),
    ] = None,
    text: OptionalTextOption = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Use at most this many tokens of --text.")
    ] = 20480,
    sequence_length: SequenceLengthOption = None,
    greedy_step: Annotated[
        float,
        typer.Option("--greedy-step", help="Sparsity that a block gains per greedy round."),
    ] = DEFAULTS.step,
    greedy_until: Annotated[
        float, typer.Option("--greedy-until", help="Sparsity at which the greedy path ends.")
    ] = DEFAULTS.until,
    greedy_propagate: Annotated[
        float | None,
        typer.Option(
            "--greedy-propagate",
            help="Feed each block with the outputs of the blocks before it at this sparsity.",
        ),
    ] = DEFAULTS.propagate,
    quantize: QuantizeOption = None,
    group_size: GroupSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
) -> None:
    """Spread a sparsity budget over the projections and write a plan.

    The greedy strategy runs the model and stores its path in STATS, so one run serves every
    sparsity. For statistics of quantized weights, --model needs the same --quantize.
    """
    if (sparsity is None) == (max_perplexity_increase is None):
        raise UserError("Give exactly one of --sparsity and --max-perplexity-increase.")
    check_destination(out, "plan", force=force, inputs=(stats, model, text))
    strategy_named(strategy)
    method_named(method)
    loaded_stats = CalibrationStats.load(stats)
    modules = None if target_modules is None else tuple(target_modules.split(","))
    settings = GreedySettings(step=greedy_step, until=greedy_until, propagate=greedy_propagate)
    run = _open_run(
        loaded_stats,
        model,
        text,
        sequence_length,
        tokens,
        scheme=scheme_of(quantize, group_size),
        device=device,
        dtype=dtype,
    )
    if strategy == "greedy" and run is not None:
        # Here rather than inside allocate, to show a progress bar.
        loaded_stats.paths["greedy"] = greedy_path(
            run.model,
            loaded_stats,
            run.windows,
            method=method,
            target_modules=modules,
            settings=settings,
            progress=progress_bar,
        )
        loaded_stats.save(stats, force=True)
    plan_at = partial(
        _plan_at,
        loaded_stats,
        strategy=strategy,
        method=method,
        target_modules=modules,
        model=run.model if run else None,
        tokens=run.windows if run else None,
        settings=settings,
    )
    if max_perplexity_increase is not None:
        sparsity = _highest_sparsity(run, plan_at, loaded_stats.text, max_perplexity_increase)
    assert sparsity is not None
    plan = plan_at(sparsity)
    plan.save(out, force=force)
    say(
        f"Planned {len(plan.projections)} projections, {strategy}, target sparsity "
        f"{percent(plan.sparsity_budget)}: {out}"
    )


@dataclass(frozen=True)
class _Run:
    """A model and the text to run it on."""

    model: Any
    windows: TokenWindows


def _plan_at(stats: CalibrationStats, sparsity: float, **options: Any) -> SparsityPlan:
    return allocate(stats, sparsity=sparsity, **options)


def _open_run(
    stats: CalibrationStats,
    model: str | None,
    text: str | None,
    sequence_length: int | None,
    tokens: int,
    *,
    scheme: Scheme | None,
    device: str,
    dtype: str,
) -> _Run | None:
    from teal.models.loading import context_length, load_model, load_tokenizer

    if model is None and text is None:
        return None
    if model is None or text is None:
        raise UserError("--model and --text belong together. Give both or none.")
    quiet_libraries()
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device=device)
    stats.model.require(identity_of(loaded), "statistics")
    if scheme:
        quantize_model(loaded, scheme, progress=progress_bar)
    stats.require_format(weight_format_of(loaded))
    length = resolve_sequence_length(sequence_length, context_length(loaded.config))
    windows = token_windows(text, tokenizer, sequence_length=length, max_tokens=tokens)
    return _Run(loaded, windows)


def _highest_sparsity(
    run: _Run | None,
    plan_at: Callable[[float], SparsityPlan],
    calibration: TextProvenance,
    allowed: float,
) -> float:
    if run is None:
        raise UserError("--max-perplexity-increase needs --model and --text to measure on.")
    check_no_overlap(run.windows, calibration)

    def increase_at(sparsity: float) -> float:
        result = evaluate(
            run.model,
            run.windows,
            plan_at(sparsity),
            sparse_from=PAPER_SPARSE_FROM,
            progress=progress_bar,
        )
        return result.sparse[0].perplexity / result.dense.perplexity - 1.0

    best = 0.0
    for step in search_sparsity(increase_at, allowed):
        verdict = "within" if step.is_within else "too much"
        say(f"sparsity {percent(step.sparsity)}: perplexity {step.increase:+.2%}, {verdict}")
        best = step.sparsity if step.is_within else best
    if best == 0.0:
        raise UserError(
            f"No sparsity keeps the perplexity increase within {allowed:g}. Allow more."
        )
    return best
