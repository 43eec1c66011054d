"""`teal bench`: the group of verbs that time products and whole models."""

import typer

from teal.cli import bench_decode, bench_gemv

EXAMPLES = """Examples:

teal bench gemv llama-3-8b --sparsity 0.4,0.5 --plot gemv.png

teal bench decode models/py-16m --sparsity 0.5 --baseline transformers
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, epilog=EXAMPLES)


@app.callback()
def bench() -> None:
    """Measure speed, always beside dense and only of results that were checked."""


app.command(epilog=bench_gemv.EXAMPLES)(bench_gemv.gemv)
app.command(epilog=bench_decode.EXAMPLES)(bench_decode.decode)
