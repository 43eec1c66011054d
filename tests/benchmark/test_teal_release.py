from pathlib import Path

import pytest
import torch

from teal.benchmark import gemv
from teal.benchmark.gemv import Product
from teal.benchmark.model_configs import Shape
from teal.benchmark.teal_release import TealKernels
from teal.foundation.errors import UserError

KERNELS = """
from compile_wrapper import BaseKernel

class SparseGEMV(BaseKernel):
    pass

def splitk_sparse_gemv(x, weight, threshold, sparsity_bin):
    assert (x.shape, weight.shape, sparsity_bin) == ((1, 1, 64), (48, 64), 50)
    return x @ weight.T
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/sparse_gemv.py").write_text(KERNELS)
    return tmp_path


@pytest.mark.parametrize("dtype, is_timed", [(torch.float16, True), (torch.bfloat16, False)])
def test_teal_kernels_are_timed_in_float16_only(
    checkout: Path, dtype: torch.dtype, is_timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemv, "_ROTATION_BYTES", {"cpu": 1 << 16})
    shape = Shape(form="plain", in_features=64, output_sizes=(48,))
    product = Product(shape, dtype, torch.device("cpu"), 1)
    assert (TealKernels(checkout).time(product, 0.6, 0.5) is not None) == is_timed


def test_folder_that_is_not_a_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give a checkout of FasterDecoding/TEAL"):
        TealKernels(tmp_path)
