"""`teal demo`: runs the whole pipeline on a small model and writes a report."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from teal.allocation import GreedySettings, allocate, greedy_path
from teal.calibration import CalibrationStats, calibrate
from teal.cli.console import print_table, progress_bar, quiet_libraries, say
from teal.cli.generate import encode_prompt
from teal.cli.options import DeviceOption, DtypeOption, resolve_sequence_length
from teal.cli.stdlib_text import calibration_text, held_out_text
from teal.data import Text, check_no_overlap, token_windows
from teal.engine.engine import Engine
from teal.engine.request import Generation
from teal.evaluation import Evaluation, compare
from teal.foundation.artifact import check_destination, replace_folder, write_text
from teal.foundation.formatting import percent, with_error
from teal.foundation.ownership import write_record
from teal.foundation.version import __version__
from teal.models.loading import context_length, load_model, load_tokenizer
from teal.plan import SparsityPlan
from teal.report import DenseRow, Sample, SparseRow, figures, write_report

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal demo

teal demo models/py-16m --out demo-out --force
"""

# Kind of the folder that the demo writes.
REPORT = "report"
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
SHOWN_SPARSITY = 0.5
SPARSE_FROM = 0.5
PROMPT = "import os\n\ndef read_json(path):"
NEW_TOKENS = 60
# Runs take turns; the fastest of each is shown.
ROUNDS = 4

# Coarser than the defaults of `teal calibrate` and `teal allocate`, to finish in three minutes on
# two cores.
CALIBRATION_TOKENS = 20480
EVALUATION_TOKENS = 20480
GREEDY_TOKENS = 1024
GREEDY = GreedySettings(step=0.0125, until=0.65)


@dataclass(frozen=True)
class _DemoModel:
    """The model, and how its text becomes windows."""

    model: Any
    tokenizer: Any
    sequence_length: int


@app.command(epilog=EXAMPLES)
def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, or a name on the hub.")
    ] = "models/py-16m",
    out: Annotated[Path, typer.Option("--out", help="Folder for report and plots.")] = Path(
        "demo-out"
    ),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """Run the whole pipeline on a small model and write a report.

    Calibrates on the source of Python's standard library, makes uniform and greedy plans, evaluates
    on packages that models/py-16m was not trained on, and continues a prompt dense, sparse and with
    int8 weights.
    """
    started = time.perf_counter()
    quiet_libraries()
    check_destination(out, REPORT, force=force, inputs=(model,))
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device=device)
    length = resolve_sequence_length(None, context_length(loaded.config))
    demo_model = _DemoModel(loaded, tokenizer, length)
    calibration, held_out = calibration_text(), held_out_text()
    stats = _calibrate(demo_model, calibration)
    plans = _allocate(demo_model, stats, calibration)
    result = _evaluate(demo_model, plans, held_out)
    samples = _continue(demo_model, plans)
    dense, rows = _rows(result, plans)
    _print(dense, rows, samples, result)
    summary = _summary(stats, result, held_out)
    results = _results(result, plans, summary) | {"samples": [asdict(row) for row in samples]}
    with replace_folder(out, REPORT, force=force) as folder:
        page = write_report(
            folder,
            title=f"Activation sparsity on {Path(model).name}",
            summary=summary,
            dense=dense,
            rows=rows,
            figures=figures(dense, rows, stats, _shown(plans, "greedy")),
            samples=samples,
        )
        write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_record(folder, REPORT, {"schema_version": 1, "library_version": __version__})
    say(f"Report: {out / page.name}  ({time.perf_counter() - started:.0f} s)")


def _calibrate(demo: _DemoModel, text: Text) -> CalibrationStats:
    windows = token_windows(
        text,
        demo.tokenizer,
        sequence_length=demo.sequence_length,
        num_tokens=CALIBRATION_TOKENS,
    )
    return calibrate(demo.model, windows, progress=progress_bar)


def _allocate(demo: _DemoModel, stats: CalibrationStats, text: Text) -> list[SparsityPlan]:
    windows = token_windows(
        text,
        demo.tokenizer,
        sequence_length=min(demo.sequence_length, GREEDY_TOKENS),
        num_tokens=GREEDY_TOKENS,
        offset=CALIBRATION_TOKENS,
    )
    say(
        f"Greedy on {GREEDY_TOKENS} tokens in steps of {GREEDY.step:g} "
        f"(teal allocate: {GreedySettings().step:g} by default)."
    )
    stats.paths["greedy"] = greedy_path(
        demo.model, stats, windows, settings=GREEDY, progress=progress_bar
    )
    return [
        allocate(stats, sparsity=sparsity, strategy=strategy)
        for strategy in ("uniform", "greedy")
        for sparsity in SPARSITIES
    ]


def _evaluate(demo: _DemoModel, plans: Sequence[SparsityPlan], text: Text) -> Evaluation:
    windows = token_windows(
        text,
        demo.tokenizer,
        sequence_length=demo.sequence_length,
        max_tokens=EVALUATION_TOKENS,
    )
    check_no_overlap(windows, plans[0].calibration)
    return compare(demo.model, windows, plans, sparse_from=SPARSE_FROM, progress=progress_bar)


def _continue(demo: _DemoModel, plans: Sequence[SparsityPlan]) -> list[Sample]:
    prompt = encode_prompt(PROMPT, demo.tokenizer)
    engine = Engine(demo.model, _shown(plans, "greedy"), tokenizer=demo.tokenizer)
    rounded = Engine(demo.model, tokenizer=demo.tokenizer, quantize="int8", quantize_head=True)

    runs: dict[str, tuple[Engine, float | None]] = {
        "dense": (engine, 0.0),
        f"greedy at {percent(SHOWN_SPARSITY)}": (engine, None),
        "dense, weights of int8": (rounded, None),
    }
    results: dict[str, list[Generation]] = {title: [] for title in runs}
    for _ in range(ROUNDS):
        for title, (runner, sparsity) in runs.items():
            results[title].append(
                runner.generate(
                    prompt, max_new_tokens=NEW_TOKENS, sparsity=sparsity, stop_tokens=()
                )
            )
    return [
        Sample(
            title=title,
            prompt=PROMPT,
            continuation=several[0].texts[0],
            # The first run loads compiled kernels, and other programs slow some runs down.
            tokens_per_second=max(result.tokens_per_second for result in several),
        )
        for title, several in results.items()
    ]


def _shown(plans: Sequence[SparsityPlan], strategy: str) -> SparsityPlan:
    return next(
        plan
        for plan in plans
        if (plan.strategy, plan.target_sparsity) == (strategy, SHOWN_SPARSITY)
    )


def _rows(result: Evaluation, plans: Sequence[SparsityPlan]) -> tuple[DenseRow, list[SparseRow]]:
    dense = DenseRow(
        perplexity=result.dense.perplexity, perplexity_error=result.dense.perplexity_error
    )
    rows = [
        SparseRow(
            strategy=plan.strategy,
            target_sparsity=plan.target_sparsity,
            effective_sparsity=score.effective_sparsity,
            perplexity=score.perplexity,
            perplexity_error=score.perplexity_error,
            kl=score.kl,
            top1_agreement=score.top1_agreement,
        )
        for plan, score in zip(plans, result.sparse, strict=True)
    ]
    return dense, rows


def _results(
    result: Evaluation, plans: Sequence[SparsityPlan], summary: dict[str, str]
) -> dict[str, Any]:
    return {
        "summary": summary,
        "torch": torch.__version__,
        "teal": __version__,
        "dense": result.dense.to_dict(),
        "sparse": [
            {"strategy": plan.strategy, "target_sparsity": plan.target_sparsity, **score.to_dict()}
            for plan, score in zip(plans, result.sparse, strict=True)
        ],
    }


def _summary(stats: CalibrationStats, result: Evaluation, held_out: Text) -> dict[str, str]:
    return {
        "Model": f"{stats.model.model_type}, {len(stats.model.shapes)} projections, {stats.dtype}",
        "Calibration": f"{stats.text.num_tokens} tokens: {stats.text.source}",
        "Greedy": f"{GREEDY_TOKENS} tokens, steps of {GREEDY.step:g}",
        "Evaluation": f"{result.tokens} scored tokens: {held_out.source}",
        "Protocol": f"windows of {result.sequence_length}, sparse from {SPARSE_FROM:g} on",
    }


def _print(
    dense: DenseRow, rows: Sequence[SparseRow], samples: Sequence[Sample], result: Evaluation
) -> None:
    table = [["dense", "–", "0.0 %", with_error(dense.perplexity, dense.perplexity_error), "", ""]]
    table += [
        [
            row.strategy,
            percent(row.target_sparsity),
            percent(row.effective_sparsity),
            with_error(row.perplexity, row.perplexity_error),
            f"{row.kl:.4f}",
            percent(row.top1_agreement),
        ]
        for row in rows
    ]
    title = f"{result.tokens} held-out tokens, windows of {result.sequence_length}"
    columns = ["strategy", "target", "effective", "perplexity", "KL", "top-1 agreement"]
    print_table(title, columns, table)
    for sample in samples:
        speed = f"{sample.tokens_per_second:.0f} tokens/s"
        say(f"\n── {sample.title}, {speed} ──\n{sample.prompt}{sample.continuation}")
