import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("numba")

import numba

from teal.kernels.cpu import threads

TWO_THREADS_AT_ONCE = """
import logging
from concurrent.futures import ThreadPoolExecutor

import torch

from teal.kernels.ops import sparse_gemv

logging.basicConfig()
torch.set_num_threads(2)
x, weight = torch.randn(512), torch.randn(512, 1024)
expected = sparse_gemv(x, weight, 0.5)
with ThreadPoolExecutor(4) as pool:
    products = list(pool.map(lambda _: sparse_gemv(x, weight, 0.5), range(100)))
assert all(torch.equal(product, expected) for product in products)
"""


ONE_THREAD = """
import torch

from teal.kernels.ops import sparse_gemv

torch.set_num_threads(1)
sparse_gemv(torch.randn(8), torch.randn(8, 16), 0.5)
assert torch.get_num_threads() == 1
"""


@pytest.fixture
def eight_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 6)
    monkeypatch.setattr(threads, "allowed_cores", lambda: 16)
    yield
    torch.set_num_threads(before)


def test_no_more_threads_are_used_than_cores_are_allowed(
    eight_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "allowed_cores", lambda: 3)
    assert threads.available_threads() == 3


@pytest.mark.parametrize(
    "in_features, out_features, expected",
    [(4096, 11008, 6), (4096, 512, 4), (1024, 256, 2), (64, 64, 1), (0, 0, 1)],
)
def test_threads_follow_torch_up_to_what_numba_has_and_the_weight_can_use(
    eight_threads: None, in_features: int, out_features: int, expected: int
) -> None:
    assert threads.thread_count(in_features, out_features) == expected


def test_a_call_leaves_the_thread_setting_of_numba_as_it_was() -> None:
    available = numba.config.NUMBA_NUM_THREADS
    if available == 1:
        pytest.skip("needs more than one thread")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert threads.run_threaded(available, numba.get_num_threads) == available
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_one_thread_calls_without_touching_the_setting() -> None:
    before = numba.get_num_threads()
    assert threads.run_threaded(1, numba.get_num_threads) == before


def test_torch_keeps_its_number_of_threads_when_those_of_numba_start() -> None:
    subprocess.run([sys.executable, "-c", ONE_THREAD], check=True)


def test_without_openmp_two_python_threads_wait_for_each_other_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "workqueue")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    run = subprocess.run(
        [sys.executable, "-c", TWO_THREADS_AT_ONCE], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("found no OpenMP") == 1
