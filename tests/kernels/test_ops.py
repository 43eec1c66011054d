import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels import dispatch, ops
from teal.kernels.reference import matmul as reference
from tests.helpers import relative_error
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, attended

TINY = 2e-6


def _draw(*shape: int, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


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
    expected = dispatch.IMPLEMENTATIONS["CompositeExplicitAutograd"][name](*arguments)
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


@pytest.mark.parametrize(
    "place, tensor, message",
    [
        (0, _draw(3, 97), "qkv has shape"),
        (0, _draw(3, 64), "qkv has shape"),
        (0, _draw(2, 128), "qkv has shape"),
        (1, _draw(3, 2, 41, 16), "keys have shape"),
        (1, _draw(3, 2, 16, 40).mT, "contiguous"),
        (2, _draw(3, 2, 40, 16).half(), "one dtype"),
        (3, torch.zeros(2, dtype=torch.int64), "positions has shape"),
        (3, torch.zeros(3, dtype=torch.int32), "int64"),
        (4, _draw(43, 9), "at most 8"),
        (5, _draw(39, 4), "cosines have shape"),
    ],
)
def test_operands_of_attention_that_do_not_fit_are_refused(
    place: int, tensor: Tensor, message: str
) -> None:
    tensors = list(_attention("cpu")[0])
    tensors[place] = tensor
    with pytest.raises(UserError, match=message):
        ops.attend(*tensors, score_scale=1.0)


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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": _draw(1, 71)}, "Give x"),
        ({"weight": _draw(70, 96).half()}, "one dtype"),
        ({"shift": _draw(71)}, r"shift has shape \(71,\)"),
        ({"bias": _draw(95)}, r"bias has shape \(95,\)"),
        ({"thresholds": [0.5]}, "one of each per part"),
        ({"output_sizes": [32, 32]}, "do not sum to the 96 columns"),
        ({"residual": _draw(3, 96)}, "residual has shape"),
        ({"bias": _draw(96).half()}, "one dtype"),
        ({"residual": _draw(1, 96).half()}, "one dtype"),
        ({"score_scale": _draw(2, 71)}, r"score_scale has shape \(71,\)"),
        ({"norm_weight": _draw(96)}, r"norm_weight has shape \(96,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    fitting = {"x": _draw(1, 70), "weight": _draw(70, 96), "thresholds": [0.5, 0.5]}
    with pytest.raises(UserError, match=message):
        ops.sparse_linear(**{**fitting, "output_sizes": [32, 64], **change})


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"weight \(out_features, in_features\)"):
        ops.lm_head_gemv(_draw(1, 70), _draw(70, 96))
    with pytest.raises(UserError, match="one dtype"):
        ops.lm_head_gemv(_draw(1, 70), _draw(96, 70).half())


def test_an_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="Known: gelu_pytorch_tanh, silu"):
        ops.sparse_glu(_draw(1, 70), _draw(70, 96), [0.5, 0.5], "relu")


def test_without_numba_a_product_is_right_and_a_warning_says_once_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "cpu_gemv", None)
    dispatch._say_once.cache_clear()
    x, weight = _draw(1, 8), _draw(8, 4)
    for _ in range(2):
        assert torch.equal(ops.sparse_gemv(x, weight, -1.0), x @ weight)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "numba is not installed: on a CPU nothing is skipped. Try: pip install numba")
    ]
