"""`teal bench decode`: how fast does a whole model decode, beside dense, limit and baselines?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal.cli.console import print_json, print_table, progress_bar, quiet_libraries, say
from teal.cli.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    QuantizeHeadToo,
    QuantizeSeveralOption,
    TablesOption,
    formats_of,
)
from teal.foundation.formatting import format_name, percent
from teal.kernels.tuning import tuning_folder

if TYPE_CHECKING:
    from teal.benchmark.decode import DecodeResult
    from teal.benchmark.model import BenchmarkModel
    from teal.benchmark.profile import KernelTime

EXAMPLES = """Examples:

teal bench decode models/py-16m --sparsity 0.5 --baseline transformers

teal bench decode --config llama-3-8b --sparsity 0.4,0.5,0.65 --plot decode.png

teal bench decode --config hidden=2048,intermediate=5632,layers=8,heads=16,vocab=32000

teal bench decode --config llama-3-8b --quantize none --quantize int8 --quantize int4
--quantize-head

teal bench decode --config llama-3-8b --quantize none --quantize int8 --tune tables

teal bench decode --config llama-3-8b --tables tables
"""

SPARSITIES = "0.4,0.5,0.65"

# More than any cache holds.
_LAYERS = 8
_SHOWN_KERNELS = 20
_SHOWN_NAME = 60


def decode(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Model folders, or names on the hub."),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            help="Random weights of a model's sizes: llama-3-8b and the like, or hidden=…,"
            "intermediate=…,layers=…,heads=…,vocab=…. May be repeated.",
        ),
    ] = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="Fractions beside dense, separated by commas.")
    ] = SPARSITIES,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Random tokens before the first new one.")
    ] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to decode.")] = 256,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Interleaved repetitions; their median is shown.")
    ] = 5,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="Measure beside transformers, transformers-compiled, torch-compile or llama-cpp. "
            "May be repeated.",
        ),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="The model for --baseline llama-cpp.")
    ] = None,
    quantize: QuantizeSeveralOption = None,
    group_size: GroupSizeOption = None,
    quantize_head: QuantizeHeadToo = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, float16 or float32.")
    ] = "bfloat16",
    device: DeviceOption = "auto",
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the kernels of one decode step instead.")
    ] = False,
    tune: Annotated[
        Path | None,
        typer.Option(
            "--tune",
            metavar="FOLDER",
            help="Search the fastest configs of a step's products instead, on a few layers of a "
            "--config, and write their table there.",
        ),
    ] = None,
    tables: TablesOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw tokens/s against sparsity to this file.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option("--commit", help="Commit to record where git does not know it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time the decoding of one stream, end to end: kernels, sampling and the way to the host.

    Thresholds are set on the spot, from a dense pass over random tokens, for each format of the
    weights. A speed-up is that over dense decoding with the same weights. The share of the limit
    is that of the time to read all kept weights, the head and the cache at the speed that a plain
    sum reads memory in the same run.
    """
    from teal.benchmark.baselines import check_baselines, make_baselines
    from teal.benchmark.decode import measure
    from teal.benchmark.environment import describe_machine
    from teal.benchmark.model import Workload
    from teal.benchmark.roofline import read_bandwidth
    from teal.cli.bench import fractions_of
    from teal.cli.bench_sources import Sources
    from teal.models.placement import resolve_device

    quiet_libraries()
    place, fractions = resolve_device(device), fractions_of(sparsity)
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    check_baselines(baseline or ())
    if tables:
        tuning_folder(tables)
    formats = formats_of(quantize or (), group_size, quantize_head)
    most_layers = _LAYERS if tune else None
    sources = Sources(
        models or (), config or (), formats, device=device, dtype=dtype, most_layers=most_layers
    )
    if profile or tune:
        for subject in sources.subjects(workload):
            if tune:
                _write_table(tune, subject)
            else:
                _print_kernels(subject, fractions)
            # Its memory is free before the next one takes any.
            del subject
        return
    bandwidth = read_bandwidth(place)
    results: list[DecodeResult] = []
    for subject in sources.subjects(workload):
        baselines = make_baselines(
            baseline or (), sources.baseline_model(subject.name, baseline or ()), gguf
        )
        results += measure(subject, fractions, baselines, bandwidth, progress_bar)
        # Their memory is free before the next model takes any.
        del subject, baselines
        # Other programs may have slowed one reading down; the fastest is what memory can do.
        bandwidth = max(bandwidth, read_bandwidth(place))
    results = [replace(result, bandwidth=bandwidth) for result in results]
    if plot:
        from teal.benchmark.plot import save_decode_plot

        save_decode_plot(results, plot)
    if json:
        machine = describe_machine(place, commit)
        records = [result.to_dict() for result in results]
        print_json({"machine": machine, "bandwidth": bandwidth, "results": records})
    else:
        _print(results)


def _print(results: "Sequence[DecodeResult]") -> None:
    columns = ["runner", "weights", "head", "sparsity", "effective", "tokens/s", "ms/token"]
    columns += ["10–90 %", "limit ms", "of limit", "speed-up"]
    for model in dict.fromkeys(result.model for result in results):
        mine = [result for result in results if result.model == model]
        title = (
            f"{_model_name(model)}, {mine[0].dtype}, {mine[0].prompt_tokens} + "
            f"{mine[0].new_tokens} tokens; memory reads {mine[0].bandwidth / 1e9:.0f} GB/s"
        )
        print_table(title, columns, [_row(result) for result in mine])


def _row(result: "DecodeResult") -> list[str]:
    return [
        result.runner,
        format_name(result.weights.format, result.weights.group_size),
        result.weights.head_format,
        percent(result.sparsity),
        percent(result.effective_sparsity),
        f"{result.tokens_per_second:.1f}",
        f"{result.token.median / 1e3:.2f}",
        f"{result.token.low / 1e3:.2f}–{result.token.high / 1e3:.2f}",
        f"{result.limit / 1e3:.2f}",
        percent(result.share_of_limit),
        f"{result.speed_up:.2f}×",
    ]


def _write_table(folder: Path, subject: "BenchmarkModel") -> None:
    from teal.benchmark.environment import describe_machine
    from teal.benchmark.tuning.decode_step import tune
    from teal.benchmark.tuning.table import write_cuda_table

    name = describe_machine(subject.device)["device"]
    for task, found in tune(subject, progress_bar):
        # One after the other, so that an interrupted search keeps what it found.
        path = write_cuda_table(folder, {task: found.config}, name)
        kind = "dense" if task.is_dense else "sparse"
        say(f"{task.in_features} → {task.out_features} from {task.form}, {kind}: {found}")
    say(f"The table is in {path}. Use it with --tables {folder}.")


def _print_kernels(subject: "BenchmarkModel", fractions: Sequence[float]) -> None:
    from teal.benchmark.profile import profile_step

    for sparsity, engine in subject.engines([0.0, *fractions]).items():
        kernels = profile_step(engine.decoder(), subject.prompt, subject.capacity)
        whole = sum(kernel.microseconds for kernel in kernels)
        rows = [_kernel_row(kernel, whole) for kernel in kernels[:_SHOWN_KERNELS]]
        kind = format_name(subject.weights.format, subject.weights.group_size)
        model = f"{_model_name(subject.name)}, {kind}"
        title = f"{model}, {percent(sparsity)} sparse: {whole:.0f} µs a step"
        print_table(title, ["kernel", "calls", "µs", "share"], rows)


def _kernel_row(kernel: "KernelTime", whole: float) -> list[str]:
    return [
        kernel.name[:_SHOWN_NAME],
        f"{kernel.calls:g}",
        f"{kernel.microseconds:.1f}",
        percent(kernel.microseconds / whole),
    ]


def _model_name(name: str) -> str:
    return name if "=" in name else Path(name).name
