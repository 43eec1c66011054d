"""How many threads run a compiled CPU kernel, and the call on them."""

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from statistics import median
from typing import TypeVar

import numba
import torch

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Below this many weights per thread, waking a thread costs more than it saves.
WEIGHTS_PER_THREAD = 1 << 16
# With fewer columns per thread, memory idles between one weight row and the next.
COLUMNS_PER_THREAD = 128

# A trial is this many steps, and ends after the first if that one is much slower.
_TRIAL_STEPS = 3
_HOPELESS = 1.5
# Another number has to be this much faster to be kept: timings of equal numbers differ by less.
_FASTER = 0.95
# Steps between trials: few after a change, more while nothing changes.
_SHORTEST, _LONGEST = 8, 256
# A step this much slower than those before brings the next trial forward.
_SUDDEN = 1.6
# Steps whose median is the time of the number in use.
_WINDOW = 7

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


class FreeCores:
    """Chooses the number of threads of each step of a loop from the times of the steps before.

    Threads that share a product wait for the slowest of them. Where another process has taken a
    core, that is a time slice of the scheduler per product, and one thread is faster than two. The
    system does not tell which cores are free: now and then a step runs on fewer or on more threads,
    and the faster number stays. The results of products do not depend on it.

    Args:
        most: Largest number of threads; by default torch's setting.

    Attributes:
        threads: Number of threads of the next step.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = available_threads() if most is None else most
        self._chosen = self.threads = self._most
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._trial: list[float] = []
        self._interval = self._left = _SHORTEST
        self._tries_fewer = True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run the products of a step on the chosen number of threads, and time it."""
        if self._most == 1:
            yield
            return
        started = time.perf_counter()
        with limited(self.threads):
            yield
        self.observe(time.perf_counter() - started)

    def observe(self, seconds: float) -> None:
        """Take the time of a step on `threads` threads, and choose those of the next.

        Args:
            seconds: Wall-clock time of the step.
        """
        if self.threads == self._chosen:
            self._observe_chosen(seconds)
        else:
            self._observe_trial(seconds)

    def _observe_chosen(self, seconds: float) -> None:
        usual = median(self._times) if len(self._times) == _WINDOW else None
        if usual is not None and seconds > _SUDDEN * usual:
            self._left = min(self._left, _SHORTEST // 2)
        self._times.append(seconds)
        self._left -= 1
        if self._left <= 0:
            self._trial = []
            self.threads = self._candidate()

    def _observe_trial(self, seconds: float) -> None:
        self._trial.append(seconds)
        usual = median(self._times)
        is_hopeless = self._trial[0] > _HOPELESS * usual
        if len(self._trial) < _TRIAL_STEPS and not is_hopeless:
            return
        if not is_hopeless and median(self._trial) < _FASTER * usual:
            self._chosen = self.threads
            self._times.clear()
            self._times.extend(self._trial)
            self._interval = _SHORTEST
        else:
            self.threads = self._chosen
            # Each step of a hopeless trial costs as much as many others.
            self._interval = min((4 if is_hopeless else 2) * self._interval, _LONGEST)
            self._tries_fewer = not self._tries_fewer
        self._left = self._interval

    def _candidate(self) -> int:
        """Return half or twice as many threads, in turns where both are possible."""
        fewer, more = max(1, self._chosen // 2), min(self._most, 2 * self._chosen)
        if fewer == self._chosen or (more != self._chosen and not self._tries_fewer):
            return more
        return fewer


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
