"""`teal evaluate`: score a model dense and sparse on a text."""

from typing import TYPE_CHECKING, Annotated

import typer

from teal.cli.console import print_json, print_table, progress_bar, quiet_libraries
from teal.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PlanOption,
    SequenceLengthOption,
    TextOption,
    resolve_sequence_length,
)
from teal.foundation.formatting import percent, with_error

if TYPE_CHECKING:
    from teal.evaluation import Evaluation

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

teal evaluate models/py-16m --text heldout.txt --plan plan

teal evaluate models/py-16m --text heldout.txt --plan plan --sparse-from 0 --json
"""

# The paper's protocol: the second half of every window is sparse, and scored.
PAPER_SPARSE_FROM = 0.5


@app.command(epilog=EXAMPLES)
def command(
    model: ModelArgument,
    text: TextOption,
    plan: PlanOption = None,
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
        int | None, typer.Option("--max-tokens", help="Use at most this much of the text.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Accept text that calibrated the plan.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Score a model on a text: perplexity and, with a plan, the distance to the dense model."""
    from teal.data import check_no_overlap, token_windows
    from teal.evaluation import evaluate
    from teal.models.families import identity_of
    from teal.models.loading import context_length, load_model, load_tokenizer
    from teal.plan import SparsityPlan

    quiet_libraries()
    loaded_plan = SparsityPlan.load(plan) if plan else None
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype, device=device)
    if loaded_plan:
        loaded_plan.model.require(identity_of(loaded), "plan")
    length = resolve_sequence_length(sequence_length, context_length(loaded.config))
    windows = token_windows(text, tokenizer, sequence_length=length, max_tokens=max_tokens)
    if loaded_plan and not allow_overlap:
        check_no_overlap(windows, loaded_plan.calibration)
    if sparse_from is None:
        sparse_from = PAPER_SPARSE_FROM if loaded_plan else 0.0
    result = evaluate(loaded, windows, loaded_plan, sparse_from=sparse_from, progress=progress_bar)
    if json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(result: "Evaluation") -> None:
    dense = result.dense
    rows = [["dense", "0.0 %", with_error(dense.perplexity, dense.perplexity_error), "–", "–"]]
    rows += [
        [
            "sparse",
            percent(sparse.effective_sparsity),
            with_error(sparse.perplexity, sparse.perplexity_error),
            f"{sparse.kl:.4f}",
            percent(sparse.top1_agreement),
        ]
        for sparse in result.sparse
    ]
    title = (
        f"{result.tokens} tokens, windows of {result.sequence_length}, "
        f"sparse from {result.sparse_from:g}"
    )
    print_table(title, ["", "effective sparsity", "perplexity", "KL", "top-1 agreement"], rows)
