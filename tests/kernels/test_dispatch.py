"""Which backend computes a product, and why others do not."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from teal.kernels import dispatch, ops
from teal.kernels.operands import Operands, QuantParams
from teal.kernels.reference.backend import ReferenceBackend
from teal.kernels.reference.matmul import keep_mask
from tests.helpers import relative_error
from tests.kernels.cases import draw


# docs/extending.md shows this class.
class NumpyBackend:
    """Computes products of float32 tensors on the CPU with NumPy."""

    name = "numpy"

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str | None:
        o = operands
        if quant is not None:
            return "it has no kernel for quantized weights"
        if o.x.dtype != torch.float32:
            return "x is not float32"
        if any(it is not None for it in (o.norm_weight, o.shift, o.residual, o.activation)):
            return "it computes no norm, shift, residual or activation"
        return None

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        o, products = operands, []
        for part, weight in enumerate(o.weight.split(list(o.output_sizes), dim=1)):
            score_scale = None if o.score_scale is None else o.score_scale[part]
            keep = keep_mask(o.x, o.thresholds[part], score_scale)
            products.append(np.where(keep, o.x, np.float32(0)) @ weight.numpy())
        product = torch.from_numpy(np.concatenate(products, axis=-1))
        return product if o.bias is None else product + o.bias


class Refusing:
    """A backend that computes nothing, for a reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    def can_run(self, operands: Operands, quant: QuantParams | None) -> str:
        return self.reason

    def run(self, operands: Operands, quant: QuantParams | None) -> Tensor:
        raise AssertionError("It said that it cannot run.")


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the tables of backends, and what was logged once, as they were."""
    tables = {device: list(backends) for device, backends in dispatch.BACKENDS.items()}
    monkeypatch.setattr(dispatch, "BACKENDS", tables)
    _forget()
    yield
    _forget()


def _forget() -> None:
    dispatch._log_choice.cache_clear()
    dispatch._warn.cache_clear()


def _operands(dtype: torch.dtype = torch.float32, threshold: float = 0.5) -> Operands:
    return Operands(draw(1, 8, dtype=dtype), draw(8, 4, dtype=dtype, seed=1), [threshold], [4])


def _on_a_gpu(rows: int = 1, threshold: float = 0.5, quantized: bool = False) -> Operands:
    """Return operands of a GPU without memory, so that none is needed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda")
        dtype = torch.int8 if quantized else torch.bfloat16
        weight = torch.empty(64, 64, dtype=dtype, device="cuda")
    return Operands(x, weight, [threshold], [64])


def test_backends_are_asked_in_the_order_of_their_table() -> None:
    assert [backend.name for backend in dispatch.BACKENDS["cuda"]] == ["cuda", "triton"]
    assert [backend.name for backend in dispatch.BACKENDS["cpu"]] == ["numba"]


def test_the_first_backend_that_can_run_computes_a_product() -> None:
    dispatch.BACKENDS["cpu"] = [Refusing("first", "it is ill"), NumpyBackend()]
    assert dispatch.backend_for(_operands(), None).name == "numpy"
    assert dispatch.reasons(_operands(), None) == {"first": "it is ill"}


def test_the_reference_computes_what_no_backend_can() -> None:
    dispatch.BACKENDS["cpu"] = [Refusing("first", "it is ill"), NumpyBackend()]
    operands = _operands(torch.float64)
    assert isinstance(dispatch.backend_for(operands, None), ReferenceBackend)
    assert dispatch.reasons(operands, None) == {"first": "it is ill", "numpy": "x is not float32"}
    assert ops.sparse_gemv(operands.x, operands.weight, 0.5).dtype == torch.float64


def test_a_device_without_backends_uses_the_reference() -> None:
    del dispatch.BACKENDS["cpu"]
    assert isinstance(dispatch.backend_for(_operands(), None), ReferenceBackend)
    assert dispatch.reasons(_operands(), None) == {}


def test_numba_passes_on_dtypes_that_it_does_not_know() -> None:
    pytest.importorskip("numba")
    assert dispatch.reasons(_operands(), None) == {}
    assert (
        "float32, bfloat16 or float16" in dispatch.reasons(_operands(torch.float64), None)["numba"]
    )


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        (_on_a_gpu(rows=3), "x does not have one or two rows"),
        (_on_a_gpu(threshold=-1.0), "nothing is dropped, and torch's dense product is faster"),
        (_on_a_gpu()._replace(output_sizes=[16] * 4), "there are more than three parts"),
    ],
    ids=["rows", "dense", "parts"],
)
def test_triton_says_why_it_does_not_compute_a_product(operands: Operands, reason: str) -> None:
    gemv = pytest.importorskip("teal.kernels.triton.gemv")
    assert gemv.TritonBackend().can_run(operands, None) == reason
    assert gemv.TritonBackend().can_run(_on_a_gpu(), None) is None


def test_on_rocm_the_cuda_backend_says_why_it_does_not_run_and_triton_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    operands = _on_a_gpu()
    assert dispatch.backend_for(operands, None).name == "triton"
    assert dispatch.reasons(operands, None) == {"cuda": "it needs an NVIDIA GPU"}
    dense = _on_a_gpu(threshold=-1.0)
    assert list(dispatch.reasons(dense, None)) == ["cuda", "triton"]
    assert isinstance(dispatch.backend_for(dense, None), ReferenceBackend)


def test_a_registered_backend_is_asked_first_and_computes_the_product() -> None:
    dispatch.register_backend("cpu", NumpyBackend())
    score_scale, bias = draw(2, 70, seed=2).abs(), draw(96, seed=3)
    arguments = (draw(2, 70), draw(70, 96, seed=1), [0.5, -1.0], [32, 64], score_scale, None, bias)
    operands = Operands(*arguments)
    assert dispatch.backend_for(operands, None).name == "numpy"
    expected = ReferenceBackend().run(operands, None)
    assert relative_error(ops.sparse_linear(*arguments), expected) < 1e-6


def test_a_registered_backend_leaves_to_others_what_it_cannot_compute() -> None:
    before = dispatch.backend_for(_operands(), None)
    dispatch.register_backend("cpu", NumpyBackend())
    quant = QuantParams(torch.ones(1, 4), None, 8)
    codes = _operands()._replace(weight=torch.ones(8, 4, dtype=torch.int8))
    normed = _operands()._replace(norm_weight=torch.ones(8))
    assert dispatch.reasons(codes, quant) == {"numpy": "it has no kernel for quantized weights"}
    assert dispatch.backend_for(codes, quant) is before
    assert dispatch.backend_for(normed, None) is before


def test_a_backend_may_be_registered_for_a_device_without_any() -> None:
    dispatch.register_backend("meta", NumpyBackend())
    operands = _operands()
    on_meta = operands._replace(x=operands.x.to("meta"), weight=operands.weight.to("meta"))
    assert dispatch.backend_for(on_meta, None).name == "numpy"


def test_an_automatic_choice_is_logged_once_for_each_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, dispatch.__name__)
    dispatch.BACKENDS["cpu"] = [Refusing("first", "it is ill"), NumpyBackend()]
    for _ in range(2):
        dispatch.backend_for(_operands(), None)
        dispatch.backend_for(_operands(torch.float64), None)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "On cpu, numpy computes what first cannot: it is ill"),
        ("INFO", "On cpu, the reference computes what first cannot: it is ill"),
        ("INFO", "On cpu, the reference computes what numpy cannot: x is not float32"),
    ]


def test_without_numba_a_product_is_right_and_a_warning_says_once_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch.BACKENDS["cpu"] = [dispatch._NUMBA]
    monkeypatch.setitem(dispatch.LM_HEAD_BACKENDS, "cpu", [dispatch._NUMBA])
    x, weight = draw(1, 8), draw(8, 4)
    for _ in range(2):
        assert torch.equal(ops.sparse_gemv(x, weight, -1.0), x @ weight)
        assert torch.equal(ops.lm_head_gemv(x, weight.T), F.linear(x, weight.T))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "numba is not installed: on a CPU nothing is skipped. Try: pip install numba")
    ]


def test_without_triton_a_warning_says_once_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    dispatch.BACKENDS["cuda"][1] = dispatch._TRITON
    for _ in range(2):
        assert isinstance(dispatch.backend_for(_on_a_gpu(), None), ReferenceBackend)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "Triton is not installed: some products skip nothing. Try: pip install triton")
    ]
