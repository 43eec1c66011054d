import itertools
import math
from typing import Any

import pytest

from tests.pairwise import pairwise

PARAMETERS = [
    {"a": [1, 2], "b": "xyz", "c": [True, False, None, 4]},
    {"a": range(6), "b": range(5), "c": range(2), "d": range(2), "e": range(4), "f": range(3)},
    {"a": [1, 1.5], "b": [[1], [2]]},
]
each = pytest.mark.parametrize("parameters", PARAMETERS, ids=["few", "many", "two"])


@each
def test_every_two_values_of_different_parameters_meet_in_a_row(parameters: Any) -> None:
    rows = pairwise(**parameters)
    for one, other in itertools.combinations(parameters, 2):
        for values in itertools.product(parameters[one], parameters[other]):
            assert any((row[one], row[other]) == values for row in rows)


@each
def test_rows_are_the_same_each_time_and_far_fewer_than_all_combinations(parameters: Any) -> None:
    rows = pairwise(**parameters)
    assert rows == pairwise(**parameters)
    assert all(list(row) == list(parameters) for row in rows)
    sizes = sorted(len(values) for values in parameters.values())
    assert len(rows) <= min(2 * sizes[-1] * sizes[-2], math.prod(sizes))


def test_a_parameter_that_is_alone_has_a_row_per_value() -> None:
    assert pairwise(a=[1, 2, 3]) == [{"a": 1}, {"a": 2}, {"a": 3}]
