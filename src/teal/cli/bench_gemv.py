"""`teal bench gemv`: how fast are single sparse products, beside dense ones?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal.cli.bench_options import BenchDtypeOption, CommitOption, bench_dtype, print_records
from teal.cli.console import print_table, progress_bar, say
from teal.cli.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    TablesOption,
    fractions_of,
    scheme_of,
)
from teal.foundation.formatting import percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from teal.benchmark.gemv import GemvResult, Product
    from teal.benchmark.model_configs import Shape

EXAMPLES = """Examples:

teal bench gemv llama-3-8b --sparsity 0.4,0.5 --plot gemv.png

teal bench gemv 4096x2x14336 4096x128256 --quantize int8 --tune tables
"""

SPARSITIES = "0,0.25,0.4,0.5,0.65,0.8"


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
        str | None, typer.Option("--quantize", help="Quantize the weights to int8, int4 or fp8.")
    ] = None,
    group_size: GroupSizeOption = None,
    dtype: BenchDtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    baseline_teal: Annotated[
        Path | None,
        typer.Option(
            "--baseline-teal", help="Also time the kernels of this checkout of FasterDecoding/TEAL."
        ),
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            "--tune",
            metavar="FOLDER",
            help="Instead of timing, search for the fastest tile configuration of each product "
            "and write a table to this folder.",
        ),
    ] = None,
    tables: TablesOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot time against sparsity to this file.")
    ] = None,
    commit: CommitOption = None,
    json: JsonOption = False,
) -> None:
    """Time sparse products beside dense ones, with weights that do not fit into any cache."""
    from teal.benchmark.gemv import Product, measure
    from teal.benchmark.gemv_quantized import QuantizedProduct
    from teal.benchmark.teal_release import TealKernels
    from teal.benchmark.timing import read_bandwidth
    from teal.foundation.errors import UserError
    from teal.kernels.tuning import tuning_folder
    from teal.models.placement import resolve_device

    place, number = resolve_device(device), bench_dtype(dtype)
    scheme = scheme_of(quantize, group_size)
    sparsities = fractions_of(sparsity)
    wanted = _unique(shapes)
    tuning = tuning_folder(tables)
    if scheme and baseline_teal:
        raise UserError("TEAL's kernels take float weights only. Leave out --quantize.")

    def product_of(shape: "Shape") -> Product:
        if scheme is None:
            return Product(shape, number, place, rows, tuning=tuning)
        return QuantizedProduct(shape, number, place, rows, scheme, tuning=tuning)

    if tune:
        _write_tables(tune, wanted, product_of)
        return
    baseline = TealKernels(baseline_teal) if baseline_teal else None
    bandwidth = read_bandwidth(place)
    results: list[GemvResult] = []
    for shape in progress_bar(wanted, "Products"):
        results += measure(product_of(shape), sparsities, bandwidth, baseline)
    if plot:
        from teal.benchmark.plot import save_plot

        save_plot(results, plot)
    if json:
        print_records(results, bandwidth, place, commit)
    else:
        _print(results, bandwidth)


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
        "baseline µs": [result.baseline for result in results],
        "floats µs": [result.floats for result in results],
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
    from teal.benchmark.environment import device_name
    from teal.benchmark.tuning import gemv as cuda_tuning
    from teal.benchmark.tuning import triton as triton_tuning
    from teal.benchmark.tuning.table import write_cuda_table, write_triton_table
    from teal.foundation.errors import UserError

    for shape in progress_bar(shapes, "Products"):
        product = product_of(shape)
        name = device_name(product.x.device)
        if cuda_tuning.has_kernel(product):
            task, found = cuda_tuning.tune(product)
            path = write_cuda_table(folder, {task: found.config}, name)
            say(f"{shape.name}: {found}")
        elif len(product.x) > 1:
            raise UserError("The Triton kernel is tuned for one row. Leave out --rows.")
        else:
            row = triton_tuning.tune(product)
            path = write_triton_table(folder, [row], name)
            say(f"{shape.name}: {row.config}")
    say(f"The table is in {path}. Use it with --tables {folder}.")


def _unique(names: list[str]) -> "list[Shape]":
    from teal.benchmark.model_configs import shapes_of

    return list(dict.fromkeys(shape for name in names for shape in shapes_of(name)))
