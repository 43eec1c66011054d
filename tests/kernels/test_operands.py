import pytest

from teal.kernels.operands import MAX_PARTS, Operands, padded_thresholds, part_starts
from tests.kernels.cases import draw


@pytest.mark.parametrize(
    ("thresholds", "padded"),
    [([0.5], (0.5, 0.0, 0.0)), ([0.5, -1.0], (0.5, -1.0, 0.0)), ([3, 2, 1], (3, 2, 1))],
)
def test_thresholds_of_parts_that_do_not_exist_are_zero(
    thresholds: list[float], padded: tuple[float, ...]
) -> None:
    assert padded_thresholds(thresholds) == padded
    assert len(padded) == MAX_PARTS


@pytest.mark.parametrize(
    ("output_sizes", "starts"),
    [([96], (96, 96)), ([64, 32], (64, 96)), ([64, 16, 8], (64, 80))],
)
def test_parts_that_do_not_exist_start_behind_the_last_column(
    output_sizes: list[int], starts: tuple[int, int]
) -> None:
    assert part_starts(output_sizes) == starts


@pytest.mark.parametrize(("shape", "rows"), [((8,), 1), ((3, 8), 3), ((2, 5, 8), 10), ((0, 8), 0)])
def test_all_dimensions_but_the_last_are_rows(shape: tuple[int, ...], rows: int) -> None:
    assert Operands(draw(*shape), draw(8, 4), [0.5], [4]).rows == rows


def test_an_operand_that_is_not_given_is_none_and_changes_nothing() -> None:
    operands = Operands(draw(1, 8), draw(8, 4), [0.5], [4])
    given = {"x", "weight", "thresholds", "output_sizes", "eps", "tuning"}
    assert all(getattr(operands, name) is None for name in operands._fields if name not in given)
    assert (operands.eps, operands.tuning) == (0.0, "")
