import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels import dispatch_quantized, ops, ops_quantized
from teal.kernels.reference import quantized as reference_quantized
from teal.quantization import Scheme, round_to_nearest
from tests.helpers import relative_error
from tests.kernels.cases import draw

TINY = 2e-6
SCHEMES = {
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(format="int4", group_size=32),
    "int4 with zeros": Scheme(format="int4", group_size=32, symmetric=False),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
operations = pytest.mark.parametrize("name", ["quantized_linear", "quantized_glu"])


def weight_of(scheme: Scheme, device: torch.device | str) -> tuple[Any, ...]:
    weight = round_to_nearest(draw(70, 96, seed=1), scheme).to(device)
    return weight.codes, weight.scales, weight.zeros, weight.group_size


def call(name: str, scheme: Scheme, device: torch.device | str) -> tuple[Any, ...]:
    x, *vectors, residual, norm_weight = (
        tensor.to(device)
        for tensor in (
            draw(2, 1, 70),
            draw(2, 70, seed=2).abs(),
            draw(70, seed=3),
            draw(96, seed=4),
            draw(2, 1, 96, seed=5),
            draw(70, seed=6),
        )
    )
    start = (x, *weight_of(scheme, device), [0.5, 0.7])
    if name == "quantized_glu":
        return (*start, "silu", *vectors, norm_weight, 1e-5)
    return (*start, [32, 64], *vectors, residual, norm_weight, 1e-5)


@operations
@schemes
def test_operations_keep_their_contract_with_torch(
    name: str, scheme: Scheme, device: torch.device
) -> None:
    operation = getattr(torch.ops.teal, name).default
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    # To see whether an operand was changed torch computes with it, which it cannot in fp8.
    checks = checks[1:] if scheme.format == "fp8" else checks
    torch.library.opcheck(operation, call(name, scheme, device), test_utils=checks)


@operations
@schemes
def test_operations_equal_the_reference(name: str, scheme: Scheme, device: torch.device) -> None:
    arguments = call(name, scheme, device)
    expected = dispatch_quantized.IMPLEMENTATIONS["CompositeExplicitAutograd"][name](*arguments)
    result = getattr(ops_quantized, name)(*arguments)
    assert result.shape == expected.shape
    assert relative_error(result, expected) < TINY


@schemes
@pytest.mark.parametrize("output_sizes", [[32, 64], [33, 63]], ids=str)
def test_the_general_path_holds_few_columns_as_floats(
    scheme: Scheme, output_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, *weight = call("quantized_linear", scheme, "cpu")[:5]
    arguments = (x, *weight, [0.5, 0.7], output_sizes)
    compute = dispatch_quantized.IMPLEMENTATIONS["CompositeExplicitAutograd"]["quantized_linear"]
    at_once, sizes = compute(*arguments), []

    def dequantized(*arguments: Any) -> Tensor:
        floats = reference_quantized.dequantized(*arguments)
        sizes.append(floats.numel())
        return floats

    monkeypatch.setattr(dispatch_quantized, "dequantized", dequantized)
    monkeypatch.setattr(dispatch_quantized, "_MOST_FLOATS", 70 * 7)
    assert relative_error(compute(*arguments), at_once) < TINY
    # Of int4, one more column.
    assert max(sizes) <= 70 * 8
    assert len(sizes) == sum(math.ceil(width / 7) for width in output_sizes)


@operations
@schemes
def test_operations_compile_into_one_graph(name: str, scheme: Scheme, device: torch.device) -> None:
    arguments = call(name, scheme, device)

    def doubled(x: Tensor) -> Tensor:
        return 2 * getattr(ops_quantized, name)(x, *arguments[1:])

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), doubled(arguments[0]), rtol=0, atol=0)


@pytest.mark.gpu
@operations
@schemes
def test_operations_are_captured_in_a_cuda_graph(name: str, scheme: Scheme) -> None:
    arguments = call(name, scheme, "cuda")
    expected = getattr(ops_quantized, name)(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = getattr(ops_quantized, name)(*arguments)
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=TINY, atol=TINY)


@pytest.mark.gpu
def test_one_row_of_16_bits_is_computed_by_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_gemv = pytest.importorskip("teal.kernels.cuda.gemv")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs clusters of blocks")
    calls, compute = [], cuda_gemv.compute

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return compute(*given)

    monkeypatch.setattr(cuda_gemv, "compute", counted)
    x, weight = draw(1, 70).cuda().bfloat16(), draw(70, 96, seed=1).cuda().bfloat16()
    codes = weight_of(SCHEMES["int4 with zeros"], "cuda")
    ops.sparse_gemv(x, weight, 0.5)
    ops.sparse_linear(x, weight, [0.5, 0.4], [32, 64])
    ops.sparse_glu(x, weight, [0.5, 0.4], "silu")
    ops_quantized.quantized_linear(x, *codes, [-1.0, -1.0], [32, 64])
    assert len(calls) == 4
    ops_quantized.quantized_glu(x, *codes, [0.5, 0.4], "silu")
    assert len(calls) == 5


@schemes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_every_dtype_and_number_of_rows_has_an_implementation(
    scheme: Scheme, dtype: torch.dtype, rows: int, device: torch.device
) -> None:
    x, weight = draw(rows, 70).to(device, dtype), weight_of(scheme, device)
    result = ops_quantized.quantized_linear(x, *weight, [-1.0], [96])
    assert result.dtype == dtype
    dense = round_to_nearest(draw(70, 96, seed=1), scheme).dequantize(torch.float64).to(device)
    assert relative_error(result, x.double() @ dense) < torch.finfo(dtype).eps + 1e-15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": draw(1, 71)}, "x has shape"),
        ({"codes": torch.zeros(70, 48)}, "Give a channel-major weight of int8"),
        ({"codes": torch.zeros(70, 47, dtype=torch.uint8)}, r"codes has shape .* \(70, 48\)"),
        ({"codes": torch.zeros(70, 96, dtype=torch.int8)}, "only with int4 codes"),
        ({"scales": draw(2, 96)}, r"scales has shape \(2, 96\)\. Give \(3, 96\)"),
        ({"zeros": torch.zeros(3, 48, dtype=torch.uint8)}, "zeros has shape"),
        ({"zeros": torch.zeros(3, 96)}, "Give uint8"),
        ({"group_size": 0}, "in groups of 0"),
        ({"output_sizes": [32, 32]}, "do not sum to the 96 columns"),
        ({"bias": draw(95)}, r"bias has shape \(95,\)"),
        ({"residual": draw(1, 96).half()}, "one dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    names = ("codes", "scales", "zeros", "group_size")
    fitting = dict(zip(names, weight_of(SCHEMES["int4 with zeros"], "cpu"), strict=True))
    fitting |= {"x": draw(1, 70), "thresholds": [0.5, 0.5], "output_sizes": [32, 64]}
    with pytest.raises(UserError, match=message):
        ops_quantized.quantized_linear(**{**fitting, **change})


def test_an_unknown_activation_names_the_known_ones() -> None:
    weight = weight_of(SCHEMES["int8"], "cpu")
    with pytest.raises(UserError, match="Known: gelu_pytorch_tanh, silu"):
        ops_quantized.quantized_glu(draw(1, 70), *weight, [0.5, 0.5], "relu")
