"""`teal bench decode`: how fast does a whole model decode, beside dense and other engines?"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal.cli.bench_options import BenchDtypeOption, CommitOption, print_records
from teal.cli.console import print_table, progress_bar, quiet_libraries, say
from teal.cli.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    QuantizeHeadToo,
    QuantizeSeveralOption,
    TablesOption,
    formats_of,
    fractions_of,
)
from teal.foundation.formatting import format_name, percent

if TYPE_CHECKING:
    import torch

    from teal.benchmark.decode import DecodeResult
    from teal.benchmark.model import BenchmarkModel, Workload
    from teal.benchmark.profile import KernelTime
    from teal.cli.bench_sources import Sources

EXAMPLES = """Examples:

teal bench decode models/py-16m --sparsity 0.5 --baseline transformers

teal bench decode --config llama-3-8b --quantize none --quantize int8 --tune tables
"""

SPARSITIES = "0.4,0.5,0.65"

# Layers that --tune keeps: more than any cache holds.
_TUNED_LAYERS = 8
_SHOWN_KERNELS = 20
_SHOWN_NAME = 60


def decode(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Model folders, or names on the Hugging Face hub."
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            help="Random weights in a model's sizes: a name such as llama-3-8b, or hidden=…,"
            "intermediate=…,layers=…,heads=…,vocab=…. May be repeated.",
        ),
    ] = None,
    sparsity: Annotated[
        str,
        typer.Option("--sparsity", help="Sparsities to time beside dense, separated by commas."),
    ] = SPARSITIES,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Random tokens in the prompt.")
    ] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to decode.")] = 256,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Interleaved repeats; the median is shown.")
    ] = 5,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="Also time transformers, transformers-compiled, torch-compile or llama-cpp. "
            "May be repeated.",
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", help="The model as a GGUF file, for --baseline llama-cpp."),
    ] = None,
    quantize: QuantizeSeveralOption = None,
    group_size: GroupSizeOption = None,
    quantize_head: QuantizeHeadToo = False,
    dtype: BenchDtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Instead of timing, list the kernels of one decode step."),
    ] = False,
    tune: Annotated[
        Path | None,
        typer.Option(
            "--tune",
            metavar="FOLDER",
            help="Instead of timing, search for the fastest tile configurations of a decode step, "
            "on a few layers of each --config, and write a table to this folder.",
        ),
    ] = None,
    tables: TablesOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot tokens/s against sparsity to this file.")
    ] = None,
    commit: CommitOption = None,
    json: JsonOption = False,
) -> None:
    """Time the decoding of one sequence, end to end: kernels, sampling and the copy to the host.

    Thresholds come from a dense pass over random tokens, one pass per weight format. Each speed-up
    is relative to dense decoding with the same weights. The limit is the time to read all kept
    weights, the head and the cache at the memory bandwidth measured in the same run.
    """
    from teal.benchmark.baselines import check_baselines
    from teal.benchmark.model import Workload
    from teal.cli.bench_sources import Sources
    from teal.kernels.tuning import tuning_folder
    from teal.models.placement import resolve_device

    quiet_libraries()
    place, sparsities = resolve_device(device), fractions_of(sparsity)
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    check_baselines(baseline or ())
    sources = Sources(
        models or (),
        config or (),
        formats_of(quantize or (), group_size, quantize_head),
        device=device,
        dtype=dtype,
        most_layers=_TUNED_LAYERS if tune else None,
        tuning=tuning_folder(tables),
    )
    if profile or tune:
        for model in sources.benchmark_models(workload):
            if tune:
                _write_table(tune, model)
            else:
                _print_kernels(model, sparsities)
            # Its memory is free before the next one takes any.
            del model
        return
    results = _measure(sources, workload, sparsities, place, baselines=baseline or (), gguf=gguf)
    if plot:
        from teal.benchmark.plot import save_decode_plot

        save_decode_plot(results, plot)
    if json:
        print_records(results, results[0].bandwidth, place, commit)
    else:
        _print(results)


def _measure(
    sources: "Sources",
    workload: "Workload",
    sparsities: Sequence[float],
    device: "torch.device",
    *,
    baselines: Sequence[str],
    gguf: Path | None,
) -> "list[DecodeResult]":
    from teal.benchmark.baselines import make_baselines
    from teal.benchmark.decode import measure
    from teal.benchmark.timing import read_bandwidth

    bandwidth = read_bandwidth(device)
    results: list[DecodeResult] = []
    for model in sources.benchmark_models(workload):
        others = make_baselines(baselines, sources.baseline_model(model.name, baselines), gguf)
        results += measure(model, sparsities, others, bandwidth, progress_bar)
        # Their memory is free before the next model takes any.
        del model, others
        # Other programs may have slowed one reading down; the fastest is what memory can do.
        bandwidth = max(bandwidth, read_bandwidth(device))
    return [replace(result, bandwidth=bandwidth) for result in results]


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


def _write_table(folder: Path, model: "BenchmarkModel") -> None:
    from teal.benchmark.environment import device_name
    from teal.benchmark.tuning.decode_step import tune
    from teal.benchmark.tuning.table import write_cuda_table

    for task, found in tune(model, progress_bar):
        # Written one by one, so that an interrupted search keeps what it found.
        path = write_cuda_table(folder, {task: found.config}, device_name(model.device))
        kind = "dense" if task.is_dense else "sparse"
        say(f"{task.in_features} → {task.out_features} from {task.form}, {kind}: {found}")
    say(f"The table is in {path}. Use it with --tables {folder}.")


def _print_kernels(model: "BenchmarkModel", sparsities: Sequence[float]) -> None:
    from teal.benchmark.profile import profile_step

    kind = format_name(model.weights.format, model.weights.group_size)
    for sparsity, engine in model.engines([0.0, *sparsities]).items():
        kernels = profile_step(engine.decoder(), model.prompt, model.capacity)
        whole = sum(kernel.microseconds for kernel in kernels)
        rows = [_kernel_row(kernel, whole) for kernel in kernels[:_SHOWN_KERNELS]]
        name = f"{_model_name(model.name)}, {kind}"
        title = f"{name}, {percent(sparsity)} sparse: {whole:.0f} µs per step"
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
