from typing import Any

import pytest
import torch
from torch import Tensor

from teal.foundation.errors import UserError
from teal.kernels.operands import Operands, QuantParams
from tests.helpers import relative_error
from tests.kernels import products
from tests.kernels.cases import draw
from tests.kernels.products import SCHEMES

pytest.importorskip("cuda.bindings")

from teal.kernels.cuda.gemv import CudaBackend, compute
from teal.kernels.cuda.tile_config import DTYPES
from tests.kernels.cuda.products import assert_right, times, weight_of
from tests.kernels.emulation import DEVICE

schemes = pytest.mark.parametrize("scheme", SCHEMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=dtype, seed=seed).to(DEVICE)


@pytest.fixture
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def _can_run(operands: Operands, quant: QuantParams | None) -> bool:
    return CudaBackend().can_run(operands, quant) is None


@pytest.mark.usefixtures("_on_hopper")
@schemes
def test_shapes_and_dtypes_decide_whether_the_kernel_can_run(scheme: str) -> None:
    def can_run(
        in_features: int = 128,
        columns: int = 64,
        rows: int = 1,
        threshold: float = 0.5,
        **rest: Any,
    ) -> bool:
        dtype = rest.pop("dtype", torch.bfloat16)
        weight = products.weight_of(scheme, in_features, columns, dtype)
        changed = rest.pop("tensor", lambda tensor: tensor)
        operands = weight.operands(draw(rows, in_features, dtype=dtype), [threshold], **rest)
        return _can_run(operands._replace(weight=changed(operands.weight)), weight.quant)

    is_float = scheme == "floats"
    assert can_run()
    assert can_run(dtype=torch.float16)
    assert can_run(norm_weight=torch.ones(128))
    assert can_run(threshold=-1.0) != is_float
    gated = {"output_sizes": [32] * 2, "activation": "silu"}
    assert can_run(threshold=-1.0, **gated)
    assert can_run(rows=8)
    assert can_run(rows=8, threshold=-1.0) != is_float
    assert can_run(rows=8, threshold=-1.0, **gated)
    assert not can_run(rows=9)
    assert not can_run(rows=0)
    assert not can_run(dtype=torch.float32)
    assert not can_run(columns=68)
    assert not can_run(in_features=132, norm_weight=torch.ones(132))
    assert not can_run(tensor=lambda tensor: tensor.t().contiguous().t())
    assert not can_run(output_sizes=[16] * 4)


@pytest.mark.usefixtures("_on_hopper")
def test_weights_at_odd_addresses_and_groups_of_odd_sizes_are_left_to_other_backends() -> None:
    x = draw(1, 96, dtype=torch.bfloat16)
    odd = draw(96 * 64 + 1, dtype=torch.bfloat16)[1:].view(96, 64)
    assert not _can_run(Operands(x, odd, [0.5], [64]), None)
    codes, scales = torch.zeros(96, 32, dtype=torch.uint8), torch.ones(2, 64)
    assert not _can_run(Operands(x, codes, [0.5], [64]), QuantParams(scales, None, 48))
    ints = torch.zeros(96, 64, dtype=torch.int8)
    assert not _can_run(Operands(x, ints, [0.5], [64]), QuantParams(scales, None, 48))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(2,), (8,), (3, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4 in 128"])
def test_every_row_has_its_own_mask(scheme: str, rows: tuple[int, ...]) -> None:
    weight, dtype = weight_of(scheme, 300, 192, torch.bfloat16), torch.bfloat16
    x, residual = _draw(*rows, 300, dtype=dtype), _draw(*rows, 192, dtype=dtype, seed=2)
    operands = weight.operands(x, [0.4, 0.8], output_sizes=[128, 64], residual=residual)
    assert_right(weight, operands)
    alone = [
        times(weight, one[None], [0.4, 0.8], output_sizes=[128, 64], residual=added[None])
        for one, added in zip(x.view(-1, 300), residual.view(-1, 192), strict=True)
    ]
    assert torch.equal(compute(operands, weight.quant).view(-1, 192), torch.cat(alone))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", range(2, 9))
@dtypes
def test_rows_of_floats_are_multiplied_at_once(dtype: torch.dtype, rows: int) -> None:
    weight, x = weight_of("floats", 600, 352, dtype), _draw(rows, 600, dtype=dtype)
    # One row keeps nothing, another everything.
    x[0] *= 0.01
    x[-1] += 3.0
    score_scale = 0.5 + _draw(2, 600, seed=3).abs()
    plain = {"bias": _draw(352, dtype=dtype, seed=4), "shift": 0.1 * _draw(600, seed=5)}
    residual = _draw(rows, 352, dtype=dtype, seed=2)
    assert_right(weight, weight.operands(x, [0.8], **plain, residual=residual))
    halves = {"output_sizes": [176] * 2, "activation": "silu"}
    assert_right(weight, weight.operands(0.2 * x, [0.1] * 2, **halves))
    assert_right(weight, weight.operands(0.2 * x, [0.1, 0.2], **halves, score_scale=score_scale))
    # Each row is normed on its own.
    norm_weight = 1 + 0.1 * _draw(600, seed=6)
    norm = {"output_sizes": [256, 96], "norm_weight": norm_weight, "eps": 1e-5}
    together = times(weight, x, [-1.0, 0.5], **norm)
    alone = [times(weight, row[None], [-1.0, 0.5], **norm) for row in x]
    assert relative_error(together, torch.cat(alone).double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
@schemes
def test_twice_the_same_gives_the_same_bits(scheme: str) -> None:
    weight, x = weight_of(scheme, 4096, 1024, torch.bfloat16), _draw(1, 4096, dtype=torch.bfloat16)
    first = times(weight, x, [0.5])
    assert all(torch.equal(first, times(weight, x, [0.5])) for _ in range(20))


@pytest.mark.gpu
def test_x_may_have_any_address_and_stride() -> None:
    weight, dtype = weight_of("int8", 296, 96, torch.bfloat16), torch.bfloat16
    x, norm_weight = _draw(1, 296, dtype=dtype), 1 + 0.1 * _draw(296, seed=2)
    expected = times(weight, x, [0.4], norm_weight=norm_weight, eps=1e-5)
    odd = torch.cat([x.new_zeros(1), x[0]])[1:][None]
    strided = torch.stack([x[0], x[0]], dim=1)[:, :1].t()
    for other in (odd, strided):
        assert torch.equal(times(weight, other, [0.4], norm_weight=norm_weight, eps=1e-5), expected)


@pytest.mark.gpu
@schemes
def test_a_product_waits_for_the_one_whose_result_it_reads(scheme: str) -> None:
    weight, dtype = weight_of(scheme, 1024, 1024, torch.bfloat16), torch.bfloat16
    norm_weight = torch.ones(1024, device=DEVICE)

    def chain(*, synchronize: bool) -> Tensor:
        x = _draw(1, 1024, dtype=dtype)
        for _ in range(50):
            x = times(weight, x, [0.3], residual=x, norm_weight=norm_weight, eps=1e-5)
            if synchronize:
                torch.cuda.synchronize()
        return x

    assert torch.equal(chain(synchronize=False), chain(synchronize=True))


@pytest.mark.gpu
@schemes
def test_products_are_captured_in_a_cuda_graph(scheme: str) -> None:
    weight, x = weight_of(scheme, 1024, 256, torch.bfloat16), _draw(1, 1024, dtype=torch.bfloat16)
    expected = [times(weight, factor * x, [0.5]) for factor in (1.0, 0.5)]
    graph, given = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        result = times(weight, given, [0.5])
    for factor, wanted in zip((1.0, 0.5), expected, strict=True):
        given.copy_(factor * x)
        graph.replay()
        assert torch.equal(result, wanted)


@pytest.mark.gpu
def test_the_first_product_of_a_kind_cannot_be_captured() -> None:
    weight, x = weight_of("floats", 88, 88, torch.float16), _draw(1, 88, dtype=torch.float16)
    with (
        pytest.raises(UserError, match="Run it once before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        times(weight, x, [0.5])
