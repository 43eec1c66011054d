import pytest

from teal.foundation.errors import MissingExtraError, UserError, check_sparsity, unknown_name


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, 0.999])
def test_sparsity_in_range_is_returned_as_a_float(sparsity: float) -> None:
    checked = check_sparsity(sparsity)
    assert checked == sparsity
    assert isinstance(checked, float)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 50, float("nan"), float("inf"), "0.5", None])
def test_sparsity_that_is_no_fraction_is_refused_with_an_example(sparsity: object) -> None:
    with pytest.raises(UserError, match=r"^Budget .* is outside \[0, 1\)\. Give a fraction"):
        check_sparsity(sparsity, "Budget")  # type: ignore[arg-type]


def test_unknown_name_says_the_closest_and_all_known() -> None:
    error = unknown_name("strategy", "gredy", {"uniform": 1, "greedy": 2})
    assert str(error) == (
        "Unknown strategy 'gredy'. Did you mean 'greedy'? Known: greedy, uniform."
    )


def test_unknown_name_like_none_of_the_known_has_no_hint() -> None:
    assert str(unknown_name("method", "zzz", ["teal"])) == "Unknown method 'zzz'. Known: teal."


def test_missing_extra_says_what_to_install() -> None:
    error = MissingExtraError("Text 'hf:a:b'", "datasets", "data")
    assert isinstance(error, ImportError)
    assert "needs the package 'datasets'" in str(error)
    assert "pip install 'teal[data]'" in str(error)
