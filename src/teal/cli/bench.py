"""`teal bench`: how fast is it, beside dense?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal.cli import bench_decode
from teal.cli.console import print_json, print_table, progress_bar, say
from teal.cli.options import GroupSizeOption, JsonOption, TablesOption, scheme_of
from teal.foundation.errors import UserError
from teal.foundation.formatting import percent
from teal.kernels.tuning import tuning_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from teal.benchmark.gemv import GemvResult, Product
    from teal.benchmark.shapes import Shape
    from teal.quantization import Scheme

EXAMPLES = """Examples:

teal bench gemv llama-3-8b --sparsity 0.4,0.5 --plot gemv.png

teal bench gemv 4096x11008 --dtype float32 --rows 2 --json

teal bench gemv llama-3-8b --quantize int4 --group-size 64

teal bench gemv 4096x2x14336 4096x128256 --quantize int8 --tune tables

teal bench gemv llama-3-8b --rows 4 --tune tables

teal bench gemv llama-3-8b --rows 4 --tables tables
"""

GROUP_EXAMPLES = """Examples:

teal bench gemv llama-3-8b --sparsity 0.4,0.5 --plot gemv.png

teal bench decode models/py-16m --sparsity 0.5 --baseline transformers
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, epilog=GROUP_EXAMPLES)

SPARSITIES = "0,0.25,0.4,0.5,0.65,0.8"


@app.callback()
def bench() -> None:
    """Measure speed, always beside dense and only of what was found correct."""


@app.command(epilog=EXAMPLES)
def gemv(
    shapes: Annotated[
        list[str],
        typer.Argument(
            metavar="SHAPE...",
            help="Model names, or sizes: 4096x11008, 4096x2x14336, 4096x4096+1024+1024.",
        ),
    ],
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="Fractions, separated by commas.")
    ] = SPARSITIES,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Token rows.")] = 1,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Weights of int8, int4 or fp8.")
    ] = None,
    group_size: GroupSizeOption = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, float16 or float32.")
    ] = "bfloat16",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda; auto is CUDA where present.")
    ] = "auto",
    baseline_teal: Annotated[
        Path | None,
        typer.Option("--baseline-teal", help="Checkout of FasterDecoding/TEAL to measure beside."),
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            "--tune",
            metavar="FOLDER",
            help="Search the fastest configs of the products instead, and write their table there.",
        ),
    ] = None,
    tables: TablesOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw time against sparsity to this file.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option("--commit", help="Commit to record where git does not know it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time sparse products beside dense ones, on weights that no cache holds."""
    from teal.benchmark.environment import describe_machine
    from teal.benchmark.gemv import measure
    from teal.benchmark.roofline import read_bandwidth
    from teal.benchmark.teal_release import Baseline

    place, number = _device(device), _dtype(dtype)
    scheme = scheme_of(quantize, group_size)
    fractions = fractions_of(sparsity)
    wanted = _unique(shapes)
    if tables:
        tuning_folder(tables)
    if scheme and baseline_teal:
        raise UserError("TEAL's kernels are of floats. Leave out --quantize.")
    if tune:
        _write_tables(tune, wanted, lambda shape: _product(shape, number, place, rows, scheme))
        return
    baseline = Baseline(baseline_teal) if baseline_teal else None
    bandwidth = read_bandwidth(place)
    results: list[GemvResult] = []
    for shape in progress_bar(wanted, "Products"):
        product = _product(shape, number, place, rows, scheme)
        results += measure(product, fractions, bandwidth, baseline)
    if plot:
        from teal.benchmark.plot import save_plot

        save_plot(results, plot)
    if json:
        machine = describe_machine(place, commit)
        records = [result.to_dict() for result in results]
        print_json({"machine": machine, "bandwidth": bandwidth, "results": records})
    else:
        _print(results, bandwidth)


app.command(epilog=bench_decode.EXAMPLES)(bench_decode.decode)


def _product(
    shape: "Shape", dtype: "torch.dtype", device: "torch.device", rows: int, scheme: "Scheme | None"
) -> "Product":
    from teal.benchmark.gemv import Product
    from teal.benchmark.gemv_quantized import QuantizedProduct

    if scheme is None:
        return Product(shape, dtype, device, rows)
    return QuantizedProduct(shape, dtype, device, rows, scheme)


def _print(results: "list[GemvResult]", bandwidth: float) -> None:
    columns = ["product", "sparsity", "dense µs", "sparse µs", "10–90 %", "limit µs", "GB/s"]
    columns += ["of limit", "speed-up"]
    rows = [
        [
            result.shape.name,
            percent(result.sparsity),
            f"{result.dense.median:.1f}",
            f"{result.sparse.median:.1f}",
            f"{result.sparse.low:.1f}–{result.sparse.high:.1f}",
            f"{result.limit:.1f}",
            f"{result.bandwidth / 1e9:.0f}",
            percent(result.share_of_limit),
            f"{result.speed_up:.2f}×",
        ]
        for result in results
    ]
    others = {
        "baseline µs": [r.baseline for r in results],
        "floats µs": [r.floats for r in results],
    }
    for column, timings in others.items():
        if any(timings):
            columns.append(column)
            for row, timing in zip(rows, timings, strict=True):
                row.append(f"{timing.median:.1f}" if timing else "–")
    kind = " × ".join(filter(None, (results[0].dtype, results[0].format)))
    title = f"{kind}, {results[0].rows} row(s); memory reads {bandwidth / 1e9:.0f} GB/s"
    print_table(title, columns, rows)


def _write_tables(
    folder: Path, shapes: "list[Shape]", product_of: "Callable[[Shape], Product]"
) -> None:
    from teal.benchmark.environment import describe_machine
    from teal.benchmark.tuning import gemv as tune_product
    from teal.benchmark.tuning import triton as tune_tiles
    from teal.benchmark.tuning.table import write_cuda_table, write_triton_table

    for shape in progress_bar(shapes, "Products"):
        product = product_of(shape)
        name = describe_machine(product.x.device)["device"]
        if tune_product.has_kernel(product):
            task, found = tune_product.tune(product)
            path = write_cuda_table(folder, {task: found.config}, name)
            say(f"{shape.name}: {found}")
        elif len(product.x) > 1:
            raise UserError("Triton's kernel is tuned for one row. Leave out --rows.")
        else:
            row = tune_tiles.tune(product)
            path = write_triton_table(folder, [row], name)
            say(f"{shape.name}: {row.config}")
    say(f"The table is in {path}. Use it with --tables {folder}.")


def _unique(names: list[str]) -> "list[Shape]":
    from teal.benchmark.shapes import shapes_of

    return list(dict.fromkeys(shape for name in names for shape in shapes_of(name)))


def fractions_of(text: str) -> list[float]:
    """Read fractions that are separated by commas.

    Raises:
        UserError: They are none.
    """
    from teal.foundation.errors import check_sparsity

    try:
        return [check_sparsity(float(part)) for part in text.split(",")]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"Sparsity {text!r} is no list of fractions. Give 0.4,0.5.") from None


def _device(name: str) -> "torch.device":
    import torch

    from teal.foundation.errors import unknown_name

    if name not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device. Give --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(name: str) -> "torch.dtype":
    import torch

    from teal.foundation.errors import unknown_name

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise unknown_name("dtype", name, dtypes)
    return dtypes[name]
