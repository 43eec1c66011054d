"""How compiled CPU code is cached on disk, and how many threads may run it at once."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import numba
import torch

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., object])
Result = TypeVar("Result")

# Below this many weights per thread, waking a thread costs more than it saves.
WEIGHTS_PER_THREAD = 1 << 16
# A strip shorter than this per thread keeps the memory waiting between weight_rows.
COLUMNS_PER_THREAD = 128

_WORKQUEUE_LOCK = threading.Lock()


def compiled(
    *, parallel: bool = False, fuse: bool = False, reorder: bool = False
) -> Callable[[Function], Function]:
    """Compile a function with numba, keeping the machine code on disk where that is possible.

    Args:
        parallel: Let `prange` loops use threads.
        fuse: Allow a multiplication and an addition to become one instruction. NaN and inf keep
            their meaning.
        reorder: Allow that too, and sums to be taken in the order that is fastest, always the same.

    Returns:
        A decorator. The function releases the interpreter lock while it runs.
    """
    freedom = {"contract", "reassoc"} if reorder else {"contract"} if fuse else False
    # A division by zero is infinite, as in torch: to look out for it, loops would go one by one.
    options = {
        "parallel": parallel,
        "fastmath": freedom,
        "nogil": True,
        "error_model": "numpy",
    }

    def decorate(function: Function) -> Function:
        try:
            machine_code: Function = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            _warn_about_cache()
            machine_code = numba.njit(**options)(function)
        return machine_code

    return decorate


def thread_count(in_features: int, out_features: int) -> int:
    """Return how many threads share a product: torch's setting, fewer for a small weight.

    Args:
        in_features: Channels of the weight.
        out_features: Columns of the weight, which the threads divide among them.

    Returns:
        At least 1, and at most the threads that numba was started with.
    """
    useful = min(
        in_features * out_features // WEIGHTS_PER_THREAD, out_features // COLUMNS_PER_THREAD
    )
    return max(1, min(useful, available_threads()))


def available_threads() -> int:
    """Return torch's setting of threads, at most as many as numba was started with."""
    available: int = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    return available


def run_threaded(threads: int, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a parallel compiled function on some of numba's threads, leaving numba's setting as is.

    Args:
        threads: As from `thread_count`. With one, the function must not reach a parallel loop.
        function: Made by `compiled(parallel=True)`.
        *arguments: Passed to `function`.

    Returns:
        What `function` returns.
    """
    guard = _launch_guard()
    if threads == 1:
        return function(*arguments)
    before = numba.get_num_threads()
    if before == threads:
        with guard:
            return function(*arguments)
    numba.set_num_threads(threads)
    try:
        with guard:
            return function(*arguments)
    finally:
        numba.set_num_threads(before)


@cache
def _launch_guard() -> AbstractContextManager[object]:
    """Return a lock where numba needs one: workqueue ends the process when two threads call it."""
    # Starts the threads, without which the layer is not known. Where numba and torch share one
    # OpenMP that gives torch as many threads as numba has, against its user's wish.
    torch_threads = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(torch_threads)
    if numba.threading_layer() != "workqueue":
        return nullcontext()
    logger.warning(
        "numba found no OpenMP, so calls wait for each other and each takes about 0.1 ms longer. "
        "Install libgomp (Debian: apt install libgomp1)."
    )
    return _WORKQUEUE_LOCK


@cache
def _warn_about_cache() -> None:
    logger.warning(
        "Compiled CPU kernels cannot be kept: no writable folder. Every process compiles them "
        "anew, which takes seconds. Set NUMBA_CACHE_DIR to a writable folder."
    )
