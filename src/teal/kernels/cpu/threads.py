"""Decides how many threads run a compiled CPU kernel, and calls it on them."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import numba
import torch

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Below this many weights per thread, waking a thread costs more than it saves.
WEIGHTS_PER_THREAD = 1 << 16
# With fewer columns per thread, memory idles between one weight row and the next.
COLUMNS_PER_THREAD = 128

_WORKQUEUE_LOCK = threading.Lock()

# More threads than this are not used; a caller sets it for as long as it takes.
_limit: ContextVar[int] = ContextVar("limit", default=sys.maxsize)


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
    """Return torch's setting of threads, no more than numba has, cores allow or `limited` says."""
    available: int = min(
        torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, allowed_cores(), _limit.get()
    )
    return available


@cache
def allowed_cores() -> int:
    """Return the cores that this process may run on, as it was when first asked."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        # Not every system has affinities.
        return os.cpu_count() or 1


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Let the products of this Python thread use at most some threads.

    Args:
        threads: Largest number of threads, at least 1.
    """
    token = _limit.set(threads)
    try:
        yield
    finally:
        _limit.reset(token)


def run_threaded(threads: int, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a parallel compiled function on some of numba's threads, leaving numba's setting as is.

    Args:
        threads: The result of `thread_count`. With one, the function must not reach a parallel
            loop.
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
    """Return a lock where numba needs one: workqueue aborts if two Python threads call it at once.

    Otherwise return a context that does nothing.
    """
    # numba names its threading layer only after its threads have started. Where numba and torch
    # share one OpenMP, that gives torch as many threads as numba has, against its user's wish.
    torch_threads = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(torch_threads)
    if numba.threading_layer() != "workqueue":
        return nullcontext()
    _log.warning(
        "numba found no OpenMP, so calls wait for each other and each takes about 0.1 ms longer. "
        "Install libgomp (Debian: apt install libgomp1)."
    )
    return _WORKQUEUE_LOCK
