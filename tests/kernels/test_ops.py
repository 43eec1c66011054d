"""The operations' contract with torch, and that every device computes the same."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.kernels import ops
from teal.kernels.reference import matmul as reference
from teal.quantization import Scheme, round_to_nearest
from tests.helpers import relative_error
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, attended, by_reference, draw

TINY = 2e-6
SCHEMES = {
    "int8": Scheme(format="int8"),
    "fp8": Scheme(format="fp8"),
    "int4": Scheme(format="int4", group_size=32),
    "int4 with zeros": Scheme(format="int4", group_size=32, symmetric=False),
}

schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
quantized_operations = pytest.mark.parametrize("name", ["quantized_linear", "quantized_glu"])


def _draw(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).to(device)


def _calls(device: torch.device | str) -> dict[str, tuple[Any, ...]]:
    x, weight = _draw(2, 1, 70, device=device), _draw(70, 96, device=device, seed=1)
    score_scale, shift, bias = (
        _draw(70, device=device, seed=2).abs(),
        _draw(70, device=device, seed=3),
        _draw(96, device=device, seed=4),
    )
    residual, norm_weight = _draw(2, 1, 96, device=device, seed=5), _draw(70, device=device, seed=6)
    scales = torch.stack([score_scale, 2 * score_scale])
    return {
        "sparse_gemv": (x, weight, 0.5, score_scale, shift, bias),
        "sparse_linear": (
            *(x, weight, [0.5, 0.7], [32, 64], scales, shift, bias, residual, norm_weight, 1e-5),
        ),
        "sparse_glu": (x, weight, [0.5, 0.7], "silu", scales, shift, bias, norm_weight, 1e-5),
        "lm_head_gemv": (x, weight.t().contiguous()),
    }


def _attention(device: torch.device | str) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    case = ATTENTION_CASES["everything"]
    tensors, options = case.tensors(torch.float32), case.arguments(torch.float32)
    # A torch check compares clones of what it passes: NaN would differ from itself.
    caches = [cache.nan_to_num() for cache in tensors[1:3]]
    tensors = (tensors[0], *caches, *tensors[3:])
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return tuple(tensor.to(device) for tensor in tensors), on_device


operations = pytest.mark.parametrize("name", sorted(_calls("cpu")))


@operations
def test_operations_keep_their_contract_with_torch(name: str, device: torch.device) -> None:
    torch.library.opcheck(getattr(torch.ops.teal, name).default, _calls(device)[name])


@operations
def test_operations_equal_the_reference(name: str, device: torch.device) -> None:
    arguments = _calls(device)[name]
    expected = by_reference(getattr(ops, name), *arguments)
    result = getattr(ops, name)(*arguments)
    assert result.shape == expected.shape
    assert relative_error(result, expected) < TINY


@operations
def test_operations_compile_into_one_graph(name: str, device: torch.device) -> None:
    arguments = _calls(device)[name]

    def doubled(x: Tensor) -> Tensor:
        return 2 * getattr(ops, name)(x, *arguments[1:])

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), doubled(arguments[0]), rtol=0, atol=0)


def test_attention_keeps_its_contract_with_torch(device: torch.device) -> None:
    tensors, options = _attention(device)
    torch.library.opcheck(torch.ops.teal.attend.default, tensors, options)


def test_attention_compiles_into_one_graph_and_appends_there_too(device: torch.device) -> None:
    tensors, options = _attention(device)
    (qkv, keys, values), rest = tensors[:3], tensors[3:]
    expected = ops.attend(qkv, keys.clone(), values.clone(), *rest, **options)

    def doubled(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return 2 * ops.attend(qkv, keys, values, *rest, **options)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    before = keys.clone()
    assert torch.equal(compiled(qkv, keys, values), 2 * expected)
    changed = (keys != before).any(dim=(1, 3))
    assert changed.nonzero()[:, 1].tolist() == rest[0].tolist()


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
def test_attention_equals_that_of_torch(case: AttentionCase, device: torch.device) -> None:
    tensors, options = case.tensors(torch.float32), case.arguments(torch.float32)
    exact, _, _ = attended(*tensors, **options)
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    result = ops.attend(*(tensor.to(device) for tensor in tensors), **on_device)
    assert relative_error(result.cpu(), exact) < TINY


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_without_a_rule_the_product_is_the_dense_one(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = (_draw(*s, device=device).to(dtype) for s in ((9, 130), (130, 64)))
    assert torch.equal(ops.sparse_gemv(x, weight, -1.0), x @ weight)
    assert torch.equal(ops.sparse_linear(x, weight, [-1.0, -0.5], [16, 48]), x @ weight)
    gate, up = (x @ weight).chunk(2, dim=-1)
    gated = ops.sparse_glu(x, weight, [-1.0, -1.0], "silu")
    assert torch.equal(gated, torch.nn.functional.silu(gate) * up)


def test_without_a_rule_what_is_no_number_stays_visible(device: torch.device) -> None:
    x = torch.tensor([[0.0, math.nan]], device=device)
    assert ops.sparse_gemv(x, _draw(2, 3, device=device), -1.0).isnan().all()


@pytest.mark.gpu
@operations
def test_operations_are_captured_in_a_cuda_graph(name: str) -> None:
    arguments = _calls("cuda")[name]
    x = arguments[0]
    expected = getattr(ops, name)(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = getattr(ops, name)(*arguments)
    for factor in (1.0, 0.25):
        x.mul_(factor)
        expected = getattr(ops, name)(*arguments)
        graph.replay()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
def test_any_number_of_rows_has_one_mask_each(rows: int, device: torch.device) -> None:
    x, weight = _draw(rows, 130, device=device), _draw(130, 64, device=device, seed=1)
    expected = reference.sparse_gemv(x.double(), weight.double(), 0.6)
    assert relative_error(ops.sparse_gemv(x, weight, 0.6), expected) < TINY


def test_x_need_not_be_contiguous(device: torch.device) -> None:
    x, weight = _draw(130, 2, device=device).t(), _draw(130, 64, device=device, seed=1)
    expected = reference.sparse_gemv(x.contiguous(), weight, 0.6)
    assert relative_error(ops.sparse_gemv(x, weight, 0.6), expected) < TINY


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_every_float_dtype_has_an_implementation(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = _draw(1, 130, device=device).to(dtype), _draw(130, 64, device=device).to(dtype)
    assert ops.sparse_gemv(x, weight, 0.6).dtype == dtype


def test_a_threshold_of_infinity_leaves_the_bias(device: torch.device) -> None:
    x, weight, bias = (_draw(*s, device=device) for s in ((1, 64), (64, 32), (32,)))
    assert torch.equal(ops.sparse_gemv(x, weight, math.inf, bias=bias), bias[None])


def _quantized_weight(scheme: Scheme, device: torch.device | str) -> tuple[Any, ...]:
    weight = round_to_nearest(draw(70, 96, seed=1), scheme).to(device)
    return weight.codes, weight.scales, weight.zeros, weight.group_size


def _quantized_call(name: str, scheme: Scheme, device: torch.device | str) -> tuple[Any, ...]:
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
    start = (x, *_quantized_weight(scheme, device), [0.5, 0.7])
    if name == "quantized_glu":
        return (*start, "silu", *vectors, norm_weight, 1e-5)
    return (*start, [32, 64], *vectors, residual, norm_weight, 1e-5)


@quantized_operations
@schemes
def test_quantized_operations_keep_their_contract_with_torch(
    name: str, scheme: Scheme, device: torch.device
) -> None:
    operation = getattr(torch.ops.teal, name).default
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    # To see whether an operand was changed torch computes with it, which it cannot in fp8.
    checks = checks[1:] if scheme.format == "fp8" else checks
    torch.library.opcheck(operation, _quantized_call(name, scheme, device), test_utils=checks)


@quantized_operations
@schemes
def test_quantized_operations_equal_the_reference(
    name: str, scheme: Scheme, device: torch.device
) -> None:
    arguments = _quantized_call(name, scheme, device)
    expected = by_reference(getattr(ops, name), *arguments)
    result = getattr(ops, name)(*arguments)
    assert result.shape == expected.shape
    assert relative_error(result, expected) < TINY


@quantized_operations
@schemes
def test_quantized_operations_compile_into_one_graph(
    name: str, scheme: Scheme, device: torch.device
) -> None:
    arguments = _quantized_call(name, scheme, device)

    def doubled(x: Tensor) -> Tensor:
        return 2 * getattr(ops, name)(x, *arguments[1:])

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments[0]), doubled(arguments[0]), rtol=0, atol=0)


@pytest.mark.gpu
@quantized_operations
@schemes
def test_quantized_operations_are_captured_in_a_cuda_graph(name: str, scheme: Scheme) -> None:
    arguments = _quantized_call(name, scheme, "cuda")
    expected = getattr(ops, name)(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = getattr(ops, name)(*arguments)
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
    codes = _quantized_weight(SCHEMES["int4 with zeros"], "cuda")
    ops.sparse_gemv(x, weight, 0.5)
    ops.sparse_linear(x, weight, [0.5, 0.4], [32, 64])
    ops.sparse_glu(x, weight, [0.5, 0.4], "silu")
    ops.quantized_linear(x, *codes, [-1.0, -1.0], [32, 64])
    assert len(calls) == 4
    ops.quantized_glu(x, *codes, [0.5, 0.4], "silu")
    assert len(calls) == 5


@schemes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_every_dtype_and_number_of_rows_has_an_implementation(
    scheme: Scheme, dtype: torch.dtype, rows: int, device: torch.device
) -> None:
    x, weight = draw(rows, 70).to(device, dtype), _quantized_weight(scheme, device)
    result = ops.quantized_linear(x, *weight, [-1.0], [96])
    assert result.dtype == dtype
    dense = round_to_nearest(draw(70, 96, seed=1), scheme).dequantize(torch.float64).to(device)
    assert relative_error(result, x.double() @ dense) < torch.finfo(dtype).eps + 1e-15
