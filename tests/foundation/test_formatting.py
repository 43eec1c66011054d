import pytest

from teal.foundation.formatting import percent, with_error


@pytest.mark.parametrize(
    ("fraction", "shown"), [(0.5, "50.0 %"), (0.0, "0.0 %"), (0.12345, "12.3 %"), (1.0, "100.0 %")]
)
def test_fraction_is_shown_with_one_decimal(fraction: float, shown: str) -> None:
    assert percent(fraction) == shown


def test_standard_error_is_shown_where_it_is_known() -> None:
    assert with_error(7.6034, 0.125) == "7.603 ± 0.125"
    assert with_error(7.6034, None) == "7.603"
