"""Rows of parameters in which every two values meet, in place of all combinations."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Pair = tuple[tuple[str, int], tuple[str, int]]


def pairwise(**parameters: Sequence[Any]) -> list[dict[str, Any]]:
    """Choose rows so that every two values of different parameters meet in one at least.

    The choice is greedy and always the same: a row starts with a pair that is missing, and each
    further parameter takes the value that covers the most missing pairs. A parameter that is alone
    has a row per value.
    """
    if len(parameters) == 1:
        return [{name: value} for name, values in parameters.items() for value in values]
    places = [(name, range(len(values))) for name, values in parameters.items()]
    missing: dict[Pair, None] = {
        ((one, i), (other, j)): None
        for (one, firsts), (other, seconds) in itertools.combinations(places, 2)
        for i, j in itertools.product(firsts, seconds)
    }
    rows = []
    while missing:
        chosen = dict(next(iter(missing)))
        for name, indices in places:
            if name not in chosen:
                # The first of several equally good ones, turned so that all have their turn.
                turned = [(i + len(rows)) % len(indices) for i in indices]
                gains = [len(_new({**chosen, name: index}, missing)) for index in turned]
                chosen[name] = turned[gains.index(max(gains))]
        row = {name: chosen[name] for name in parameters}
        for pair in _new(row, missing):
            del missing[pair]
        rows.append({name: parameters[name][index] for name, index in row.items()})
    return rows


def _new(chosen: dict[str, int], missing: dict[Pair, None]) -> list[Pair]:
    """Return the missing pairs that a row covers."""
    return [pair for pair in missing if all(chosen.get(name) == index for name, index in pair)]


def by_pairs(**parameters: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the rows of `pairwise`."""
    rows = [list(row.values()) for row in pairwise(**parameters)]
    return pytest.mark.parametrize(list(parameters), rows, ids=str)
