import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_as_precise_as_torch
from tests.kernels.cases import draw
from tests.kernels.cpu.cases import DTYPES
from tests.pairwise import by_pairs

pytest.importorskip("numba")

from teal.kernels.cpu.lm_head import NumbaHead
from teal.kernels.ops import lm_head_gemv


@by_pairs(
    dtype=DTYPES,
    rows=[(), (1,), (2, 1), (8,), (9,)],
    size=[(63, 129), (129, 9), (700, 257), (5, 1031)],
)
def test_product_is_as_precise_as_torch(
    dtype: torch.dtype, rows: tuple[int, ...], size: tuple[int, int]
) -> None:
    in_features, out_features = size
    x = draw(*rows, in_features, dtype=dtype)
    weight = draw(out_features, in_features, dtype=dtype, seed=1)
    product = lm_head_gemv(x, weight)
    assert product.shape == (*rows, out_features)
    assert_as_precise_as_torch(product, F.linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("rows", [1, 3])
def test_bits_do_not_depend_on_the_number_of_threads_or_the_layout_of_x(rows: int) -> None:
    x, weight = draw(512, rows, dtype=torch.bfloat16), draw(1030, 520, dtype=torch.bfloat16, seed=1)
    before = torch.get_num_threads()
    products = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        products += [lm_head_gemv(x.t(), weight[:, 4:516]) for _ in range(3)]
    torch.set_num_threads(before)
    alone = lm_head_gemv(x.t().contiguous(), weight[:, 4:516].contiguous())
    assert all(torch.equal(product, alone) for product in products)


def test_nan_in_one_row_stays_visible_there_and_only_there() -> None:
    x = torch.ones(2, 65)
    x[1, 64] = float("nan")
    product = lm_head_gemv(x, draw(9, 65))
    assert product[0].isfinite().all()
    assert product[1].isnan().all()


def test_a_transposed_or_empty_weight_gives_the_product_of_torch() -> None:
    x, weight = draw(2, 65), draw(65, 9, seed=1)
    assert torch.equal(lm_head_gemv(x, weight.t()), F.linear(x, weight.t()))
    assert torch.equal(lm_head_gemv(torch.ones(2, 0), torch.ones(5, 0)), torch.zeros(2, 5))
    assert lm_head_gemv(torch.ones(2, 4), torch.ones(0, 4)).shape == (2, 0)


def test_products_that_the_kernel_cannot_compute_are_refused_with_the_reason() -> None:
    x, weight = torch.ones(8, 4), torch.ones(3, 4)
    numba = NumbaHead()
    assert numba.can_run(x, weight) is None
    assert numba.can_run(torch.ones(9, 4), weight) == "x has more than 8 rows: torch is faster"
    assert numba.can_run(x.double(), weight.double()) == "x is not float32, bfloat16 or float16"
    strided = numba.can_run(x, torch.ones(4, 3).t())
    assert strided == "the entries of a weight row do not lie side by side"
