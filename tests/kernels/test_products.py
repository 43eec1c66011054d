"""Products by every backend are those of torch, over rows in which all pairs of choices meet.

The backends are numba's kernels, Triton's and CUDA's on a GPU, and CUDA's on an emulated one.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.kernels.operands import Operands
from teal.kernels.reference import matmul as reference
from teal.quantization import QuantizedWeight, round_to_nearest
from tests.kernels.backends import (
    HAS_GPU,
    INTERPRETED,
    ProductBackend,
    backends_here,
    over_backends,
    rounded_up,
)
from tests.kernels.cases import EDGES, THRESHOLDS, VECTORS, draw
from tests.kernels.products import (
    QUANTIZED,
    SCHEMES,
    Weight,
    assert_right,
    away_from_thresholds,
    by_torch,
    of_quantized,
    weight_of,
)

INF, NAN = math.inf, math.nan

# Number of parts and activation.
FORMS: dict[str, tuple[int, str | None]] = {
    "one part": (1, None),
    "three parts": (3, None),
    "silu": (2, "silu"),
    "gelu": (2, "gelu_pytorch_tanh"),
    "two parts": (2, None),
}
MASKS = {
    "alike": [0.4, 0.4, 0.4],
    "apart": [0.3, 0.9, 0.1],
    "one dense": [1.2, -1.0, 0.5],
    "dense": [-1.0, -1.0, -1.0],
}
# Channels and columns wherever they do not matter: CUDA kernels are compiled for a size.
SIZE = (200, 96)
INTERPRETER_FILES = (
    "test_products.py",
    "test_attention.py",
    "triton/test_gemv_kernel.py",
    "triton/test_attention_kernel.py",
)


def _sizes_of_parts(parts: int, columns: int, unit: int) -> list[int]:
    """Return the columns of parts of different sizes, of which the first has `columns`."""
    return [columns, rounded_up(columns // 3, unit), unit][:parts]


def _product(backend: ProductBackend, row: dict[str, Any]) -> tuple[Weight, Operands]:
    """Draw a weight and operands for a row of parameters."""
    (parts, activation), dtype, rows = FORMS[row["form"]], row["dtype"], row["rows"]
    in_features, columns = row["size"]
    if row["norm"]:
        in_features = rounded_up(in_features, backend.norm_unit)
    sizes = _sizes_of_parts(parts, columns, backend.unit) if activation is None else [columns] * 2
    weight = weight_of(row["scheme"], in_features, sum(sizes), dtype, backend.device)
    # Sums of gates should not leave the range in which an activation bends.
    factor = 0.2 if activation is not None and not row["norm"] else 1.0

    def vector(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
        return draw(*shape, dtype=dtype, seed=seed).to(backend.device)

    has_residual = row["residual"] and activation is None
    vectors = {
        "score_scale": 0.5 + vector(parts, in_features, seed=3).abs(),
        "shift": 0.1 * factor * vector(in_features, seed=4),
        "bias": 20 * factor * vector(sum(sizes), dtype=dtype, seed=5),
        "residual": 20 * vector(*rows, sum(sizes), dtype=dtype, seed=6),
        "norm_weight": 1 + 0.1 * vector(in_features, seed=7),
    }
    has = {
        "score_scale": "score_scale" in row["vectors"],
        "shift": "shift" in row["vectors"],
        "bias": row["bias"],
        "residual": has_residual,
        "norm_weight": row["norm"],
    }
    operands = weight.operands(
        factor * vector(*rows, in_features, dtype=dtype, seed=0),
        [factor * threshold for threshold in MASKS[row["masks"]][:parts]],
        output_sizes=sizes,
        activation=activation,
        eps=1e-5 if row["norm"] else 0.0,
        **{name: tensor for name, tensor in vectors.items() if has[name]},
    )
    return weight, away_from_thresholds(operands)


@over_backends(
    form=list(FORMS),
    scheme=...,
    rows=...,
    size=...,
    dtype=...,
    vectors=VECTORS,
    masks=list(MASKS),
    setting=...,
    norm=[False, True],
    bias=[False, True],
    residual=[True, False],
)
def test_product_is_as_precise_as_torch_and_has_the_same_bits_twice(
    backend: ProductBackend, row: dict[str, Any]
) -> None:
    weight, operands = _product(backend, row)
    result = backend.run(operands, weight.quant, row["setting"])
    assert_right(weight, operands, result)
    assert torch.equal(backend.run(operands, weight.quant, row["setting"]), result)


@over_backends(dtype=..., vectors=VECTORS)
def test_kept_channels_equal_those_of_the_reference(
    backend: ProductBackend, row: dict[str, Any]
) -> None:
    dtype, device = row["dtype"], backend.device
    # Each kept channel contributes exactly its activation, to its own column.
    weight = torch.eye(64, dtype=dtype, device=device)
    score_scale = draw(64, seed=1).abs().to(device) if "score_scale" in row["vectors"] else None
    shift = draw(64, seed=2).to(device) if "shift" in row["vectors"] else None
    settings = itertools.cycle(backend.settings)
    for threshold, setting in zip(THRESHOLDS, settings, strict=False):
        x = torch.cat([torch.tensor(EDGES), draw(55)]).to(device, dtype)
        x[20:22] = threshold
        # Scores beside a threshold that only float32 tells apart from it.
        if score_scale is not None:
            score_scale[20], score_scale[21] = 1 + 2.0**-20, 1 - 2.0**-20
        if shift is not None:
            beside = 0.0 if score_scale is not None or threshold == INF else 2.0**-20 * threshold
            shift[20], shift[21] = -beside, beside
        keep = reference.keep_mask(x, threshold, score_scale, shift)
        centred = x if shift is None else (x.float() - shift).to(dtype)
        scales = None if score_scale is None else score_scale[None]
        operands = Operands(x[None], weight, [threshold], [64], score_scale=scales, shift=shift)
        result = backend.run(operands, None, setting)[0]
        # A sum that starts at +0 gives +0 for -0.
        expected = torch.where(keep, centred, 0) + 0.0
        torch.testing.assert_close(result, expected, rtol=0.0, atol=0.0, equal_nan=True)


@over_backends(scheme=..., edge=[NAN, INF, -INF], dtype=..., rows=..., setting=...)
def test_nan_and_infinity_in_one_row_stay_visible_there_and_only_there(
    backend: ProductBackend, row: dict[str, Any]
) -> None:
    weight = weight_of(row["scheme"], *SIZE, row["dtype"], backend.device)
    x = draw(*row["rows"], SIZE[0], dtype=row["dtype"]).to(backend.device)
    flat = x.view(-1, SIZE[0])
    last = len(flat) - 1
    flat[last, 77] = row["edge"]
    result = backend.run(weight.operands(x, [0.5]), weight.quant, row["setting"]).view(-1, SIZE[1])
    assert not result[last].isfinite().any()
    assert result[:last].isfinite().all()


@over_backends(scheme=..., dtype=..., rows=..., setting=...)
def test_where_all_is_dropped_exactly_bias_and_residual_are_left(
    backend: ProductBackend, row: dict[str, Any]
) -> None:
    dtype, device = row["dtype"], backend.device
    weight = weight_of(row["scheme"], *SIZE, dtype, device)
    bias = draw(SIZE[1], dtype=dtype, seed=4).to(device)
    residual = draw(*row["rows"], SIZE[1], dtype=dtype, seed=5).to(device)
    x = draw(*row["rows"], SIZE[0], dtype=dtype).to(device)
    # A threshold drops what equals it, zeros too.
    for given, threshold in ((x, INF), (x, 1e9), (torch.zeros_like(x), 0.0)):
        alone = weight.operands(given, [threshold])
        assert not backend.run(alone, weight.quant, row["setting"]).any()
        operands = alone._replace(bias=bias, residual=residual)
        result = backend.run(operands, weight.quant, row["setting"])
        assert torch.equal(result, bias + residual)


@over_backends(scheme=..., dtype=..., setting=..., parts=[1, 2])
def test_weight_rows_of_dropped_channels_are_never_used(
    backend: ProductBackend, row: dict[str, Any]
) -> None:
    dtype, sizes = row["dtype"], [SIZE[1]] * row["parts"]
    weight = weight_of(row["scheme"], SIZE[0], sum(sizes), dtype, backend.device)
    x = draw(1, SIZE[0], dtype=dtype).to(backend.device)
    thresholds = [0.6, 0.8][: row["parts"]]
    operands = weight.operands(x, thresholds, output_sizes=sizes)
    product = backend.run(operands, weight.quant, row["setting"])
    spoilt = weight.tensor.clone()
    dropped = ~reference.keep_mask(x[0], 0.6)
    if weight.quant is None:
        spoilt[dropped] = NAN
    else:
        spoilt.view(torch.uint8)[dropped] = 0x55
    again = backend.run(operands._replace(weight=spoilt), weight.quant, row["setting"])
    assert torch.equal(again, product)


@over_backends(
    scheme=QUANTIZED,
    scales=[torch.float32, torch.float16, torch.bfloat16],
    dtype=...,
    setting=...,
)
def test_scales_may_have_another_dtype_than_the_activations(
    backend: ProductBackend, row: dict[str, Any]
) -> None:
    wanted = SCHEMES[row["scheme"]]
    assert wanted is not None
    floats = draw(*SIZE, dtype=row["scales"], seed=1)
    weight = of_quantized(round_to_nearest(floats, wanted).to(backend.device))
    operands = weight.operands(draw(1, SIZE[0], dtype=row["dtype"]).to(backend.device), [0.4])
    assert_right(weight, operands, backend.run(operands, weight.quant, row["setting"]))


@over_backends(scheme=["int4 in 32", "int4 in 64 with zeros"], dtype=..., setting=...)
def test_all_channels_may_be_one_group(backend: ProductBackend, row: dict[str, Any]) -> None:
    wanted = SCHEMES[row["scheme"]]
    assert wanted is not None
    grouped = round_to_nearest(draw(600, 96, seed=1), wanted).to(backend.device)
    zeros = None if grouped.zeros is None else grouped.zeros[:1].contiguous()
    scales = grouped.scales[:1].contiguous()
    weight = of_quantized(
        QuantizedWeight(codes=grouped.codes, scales=scales, group_size=600, zeros=zeros)
    )
    operands = weight.operands(draw(1, 600, dtype=row["dtype"]).to(backend.device), [0.4])
    assert_right(weight, operands, backend.run(operands, weight.quant, row["setting"]))


def test_results_are_measured_with_the_product_of_the_reference() -> None:
    weight, x = weight_of("floats", 70, 96, torch.float64), draw(2, 70, dtype=torch.float64)
    operands = weight.operands(x, [0.5, 0.7], output_sizes=[32, 64])
    expected = reference.sparse_linear(x, weight.tensor, [0.5, 0.7], [32, 64])
    torch.testing.assert_close(by_torch(weight, operands, torch.float64), expected)


def test_every_backend_that_is_installed_has_rows() -> None:
    names = {backend.name for backend in backends_here()}
    expected = {"cpu", "cuda", "triton"} | (set() if HAS_GPU else {"emulated"})
    missing = {
        name
        for name, module in (("cpu", "numba"), ("triton", "triton"), ("cuda", "cuda.bindings"))
        if not _is_installed(module)
    }
    missing |= {"emulated"} if "cuda" in missing else set()
    assert names == expected - missing


def _is_installed(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="the GPU runs Triton's kernels itself")
@pytest.mark.slow
def test_triton_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    files = [str(folder / name) for name in INTERPRETER_FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout
