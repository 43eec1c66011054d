"""`teal evaluate`: scores a model on a text, dense and sparse, with float or quantized weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal.cli.console import print_json, print_table, progress_bar, quiet_libraries
from teal.cli.options import (
    DeviceOption,
    DtypeOption,
    GroupSizeOption,
    JsonOption,
    ModelArgument,
    QuantizeHeadToo,
    QuantizeSeveralOption,
    SequenceLengthOption,
    TextOption,
    formats_of,
    fractions_of,
    resolve_sequence_length,
)
from teal.foundation.formatting import format_name, percent, with_error

if TYPE_CHECKING:
    from teal.data import TokenWindows
    from teal.evaluation import Evaluation, FormatEvaluation
    from teal.evaluation.formats import FormatScore
    from teal.evaluation.scores import SparseScore
    from teal.plan import SparsityPlan

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal evaluate models/py-16m --text heldout.txt --plan plan

teal evaluate models/py-16m --text heldout.txt --plan plan --plan plan-int8 --sparsity 0.25,0.5
--quantize none --quantize int8
"""

# The paper's protocol: the second half of every window is sparse, and scored.
PAPER_SPARSE_FROM = 0.5


@app.command(epilog=EXAMPLES)
def command(
    model: ModelArgument,
    text: TextOption,
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", help="Plan folder. May be repeated, for example once per format."),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity", help="Evaluate the plans at these sparsities, separated by commas."
        ),
    ] = None,
    quantize: QuantizeSeveralOption = None,
    group_size: GroupSizeOption = None,
    quantize_head: QuantizeHeadToo = False,
    sparse_from: Annotated[
        float | None,
        typer.Option(
            "--sparse-from",
            help="Fraction of each window after which tokens are sparse and scored; by default "
            f"{PAPER_SPARSE_FROM} with a plan and 0 (score every token) without.",
        ),
    ] = None,
    sequence_length: SequenceLengthOption = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Use at most this many tokens of the text.")
    ] = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Accept the text that the plan was calibrated on."),
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Score a model on a text: perplexity, and distance from the dense float model.

    With --quantize, the result is a table of sparsities and formats. Each format is scored with the
    plans calibrated for it, or else with those calibrated for floats.
    """
    from teal.data import token_windows
    from teal.evaluation import WeightFormat, compare_formats, evaluate
    from teal.models.loading import context_length, load_model, load_tokenizer

    quiet_libraries()
    formats = formats_of(quantize or (), group_size, quantize_head)
    plans = load_plans(plan or (), sparsity)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device=device)
    length = resolve_sequence_length(sequence_length, context_length(loaded.config))
    windows = token_windows(text, tokenizer, sequence_length=length, max_tokens=max_tokens)
    check_plans(plans, loaded, None if allow_overlap else windows)
    if sparse_from is None:
        sparse_from = PAPER_SPARSE_FROM if plans else 0.0
    result: Evaluation | FormatEvaluation
    record: dict[str, Any] = {}
    if len(plans) > 1 or formats != [(None, False)]:
        wanted = [WeightFormat(scheme=scheme, quantize_head=head) for scheme, head in formats]
        result = compare_formats(
            loaded, windows, wanted, plans, sparse_from=sparse_from, progress=progress_bar
        )
        record = _record(model, loaded, windows)
    else:
        single = plans[0] if plans else None
        result = evaluate(loaded, windows, single, sparse_from=sparse_from, progress=progress_bar)
    if json:
        print_json(record | result.to_dict())
    else:
        _print(result)


def load_plans(folders: Sequence[Path], sparsities: str | None) -> "list[SparsityPlan]":
    """Load plans, each at every sparsity that is given.

    Raises:
        UserError: A plan cannot be read or does not reach a sparsity, or there is no plan.
    """
    from teal.foundation.errors import UserError
    from teal.plan import SparsityPlan

    plans = [SparsityPlan.load(folder) for folder in folders]
    if sparsities is None:
        return plans
    if not plans:
        raise UserError("--sparsity reads other sparsities off a plan. Give --plan too.")
    return [plan.at(sparsity) for plan in plans for sparsity in fractions_of(sparsities)]


def check_plans(
    plans: "Sequence[SparsityPlan]", model: Any, windows: "TokenWindows | None"
) -> None:
    """Check that plans belong to a model and, if windows are given, that their text differs.

    Raises:
        UserError: A plan is for another model, or was calibrated on this text.
    """
    from teal.data import check_no_overlap
    from teal.models.families import identity_of

    for plan in plans:
        plan.model.require(identity_of(model), "plan")
        if windows is not None:
            check_no_overlap(windows, plan.calibration)


def _record(source: str, model: Any, windows: "TokenWindows") -> dict[str, Any]:
    import torch

    from teal.foundation.version import __version__

    return {
        "model": source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": windows.provenance.to_dict(),
        "torch": torch.__version__,
        "teal": __version__,
    }


def _print(result: "Evaluation | FormatEvaluation") -> None:
    from teal.evaluation import Evaluation

    title = (
        f"{result.tokens} tokens, windows of {result.sequence_length}, "
        f"sparse from {result.sparse_from:g}"
    )
    perplexity = with_error(result.dense.perplexity, result.dense.perplexity_error)
    figures = ["effective sparsity", "perplexity", "KL", "top-1 agreement"]
    if not isinstance(result, Evaluation):
        dense = [result.weight_format, "float", "–", "0.0 %", "0.0 %", perplexity, "–", "–"]
        columns = ["weights", "head", "strategy", "target", *figures]
        print_table(title, columns, [dense, *map(_format_row, result.rows)])
        return
    rows = [["dense", "0.0 %", perplexity, "–", "–"]]
    rows += [["sparse", *_figures(sparse)] for sparse in result.sparse]
    print_table(title, ["", *figures], rows)


def _format_row(row: "FormatScore") -> list[str]:
    strategy, target = "–", 0.0
    if row.plan:
        is_own = row.plan.weight_format == row.weight_format
        strategy = row.plan.strategy + ("" if is_own else f" ({row.plan.weight_format})")
        target = row.plan.target_sparsity
    name = format_name(row.weight_format, row.group_size)
    return [name, row.head_format, strategy, percent(target), *_figures(row.score)]


def _figures(score: "SparseScore") -> list[str]:
    return [
        percent(score.effective_sparsity),
        with_error(score.perplexity, score.perplexity_error),
        f"{score.kl:.4f}",
        percent(score.top1_agreement),
    ]
