"""Follows how many cores are really free, and runs decode steps on as many threads.

Threads that share a product wait for the slowest of them. Where another process has taken a core,
that is a time slice of the scheduler per product, and one thread is faster than two. Which cores
are free is not to be asked anywhere, but to be seen: now and then a step is run on fewer or on more
threads, and the faster number stays.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from teal.kernels.cpu.threads import available_threads, limited

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


class FreeCores:
    """Chooses the number of threads of each step of a loop from the times of the steps before.

    The results of products do not depend on it, only their speed.

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
            self._interval = min(2 * self._interval, _LONGEST)
            self._tries_fewer = not self._tries_fewer
        self._left = self._interval

    def _candidate(self) -> int:
        """Return half or twice as many threads, in turns where both are possible."""
        fewer, more = max(1, self._chosen // 2), min(self._most, 2 * self._chosen)
        if fewer == self._chosen or (more != self._chosen and not self._tries_fewer):
            return more
        return fewer
