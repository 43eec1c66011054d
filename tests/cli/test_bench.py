import pytest

from tests.cli.conftest import Teal


def test_the_group_lists_its_verbs_and_shows_examples(teal: Teal) -> None:
    printed = teal("bench", "--help").out
    assert "gemv" in printed
    assert "decode" in printed
    assert "teal bench decode models/py-16m" in printed


@pytest.mark.parametrize("verb", ["gemv", "decode"])
def test_a_verb_of_the_group_explains_itself(teal: Teal, verb: str) -> None:
    outcome = teal("bench", verb, "--help")
    assert outcome.code == 0
    assert "--sparsity" in outcome.out


def test_an_unknown_verb_is_refused(teal: Teal) -> None:
    assert teal("bench", "training").code == 2
