from collections.abc import Callable

import pytest

pytest.importorskip("numba")

from teal.kernels.cpu.threads import FreeCores, available_threads, limited

STEPS = 2000
Times = Callable[[int], float]


def quiet(threads: int) -> float:
    return 1.0 / threads + 0.05


def busy(threads: int) -> float:
    """One core of two is taken: whoever needs both waits for a time slice."""
    return quiet(threads) if threads == 1 else 8.0


def shares_of_time(cores: FreeCores, steps: int, times: Times) -> dict[int, int]:
    """Run a loop and count its steps by number of threads."""
    counts: dict[int, int] = {}
    for _ in range(steps):
        counts[cores.threads] = counts.get(cores.threads, 0) + 1
        cores.observe(times(cores.threads))
    return counts


def seconds(counts: dict[int, int], times: Times) -> float:
    return sum(number * times(threads) for threads, number in counts.items())


@pytest.mark.parametrize("most", [2, 3, 8])
def test_on_free_cores_nearly_no_time_is_lost_to_trials(most: int) -> None:
    counts = shares_of_time(FreeCores(most), STEPS, quiet)
    assert seconds(counts, quiet) < 1.02 * STEPS * quiet(most)


def test_where_a_core_is_taken_steps_run_at_nearly_the_speed_of_one_thread() -> None:
    counts = shares_of_time(FreeCores(2), STEPS, busy)
    assert seconds(counts, busy) < 1.2 * STEPS * busy(1)


def test_a_core_that_is_taken_meanwhile_is_given_up_within_a_few_steps() -> None:
    cores = FreeCores(2)
    shares_of_time(cores, STEPS, quiet)
    assert cores.threads == 2
    shares_of_time(cores, 20, busy)
    assert cores.threads == 1


def test_a_core_that_becomes_free_is_used_again() -> None:
    cores = FreeCores(2)
    shares_of_time(cores, STEPS, busy)
    counts = shares_of_time(cores, STEPS, quiet)
    assert counts[2] > 0.8 * STEPS


def test_timings_that_hardly_differ_change_nothing() -> None:
    counts = shares_of_time(FreeCores(2), STEPS, lambda threads: 1.0 if threads == 2 else 0.97)
    assert counts[2] > 0.9 * STEPS


def test_steps_use_the_number_chosen_and_the_limit_ends_with_the_step() -> None:
    before = available_threads()
    cores = FreeCores(2)
    shares_of_time(cores, STEPS, busy)
    assert cores.threads == 1
    with cores.step():
        assert available_threads() == 1
    assert available_threads() == before


def test_one_thread_stays_one_thread() -> None:
    cores = FreeCores(1)
    with cores.step():
        assert available_threads() >= 1
    assert cores.threads == 1


def test_a_limit_holds_inside_and_is_put_back_after_an_error() -> None:
    before = available_threads()
    with pytest.raises(ValueError, match="inside"), limited(1):
        assert available_threads() == 1
        raise ValueError("inside")
    assert available_threads() == before
