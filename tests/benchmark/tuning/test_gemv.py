import pytest
import torch

from teal.benchmark import gemv
from teal.benchmark.gemv import Product
from teal.benchmark.gemv_quantized import QuantizedProduct
from teal.benchmark.model_configs import Shape
from teal.benchmark.tuning.gemv import has_kernel, tune
from teal.quantization import Scheme

SHAPES = [
    Shape(form="parts", in_features=256, output_sizes=(256, 64, 64)),
    Shape(form="gated", in_features=256, output_sizes=(256, 256)),
]


@pytest.fixture(autouse=True)
def _small_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "_ROTATION_BYTES", {"cpu": 1 << 16, "cuda": 1 << 20})


def test_cpu_has_no_kernel_to_tune() -> None:
    assert not has_kernel(Product(SHAPES[0], torch.bfloat16, torch.device("cpu"), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.form)
def test_search_returns_a_configuration_of_the_product(
    shape: Shape, format: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal.benchmark.tuning.search._DRAWN", 6)
    monkeypatch.setattr("teal.benchmark.tuning.search._NEIGHBOURS", 3)
    device, arguments = torch.device("cuda"), (shape, torch.bfloat16)
    product = (
        QuantizedProduct(*arguments, device, 1, Scheme(format=format))
        if format
        else Product(*arguments, device, 1)
    )
    if not has_kernel(product):
        pytest.skip("Triton's kernel computes floats on this GPU")
    task, found = tune(product)
    assert (task.kernel, task.in_features, task.out_features) == (
        "product",
        256,
        sum(shape.output_sizes),
    )
    assert found.config.threads <= 1024
