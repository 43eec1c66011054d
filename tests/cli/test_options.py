import pytest

from teal.cli.options import AS_IT_IS, formats_of, resolve_sequence_length, scheme_of
from teal.foundation.errors import UserError
from teal.quantization import Scheme


def test_no_format_is_the_model_as_it_is() -> None:
    assert scheme_of(None, None) is None


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_format_is_a_scheme_of_that_name(name: str) -> None:
    assert scheme_of(name, None) == Scheme(format=name)


def test_group_size_reaches_the_scheme() -> None:
    assert scheme_of("int4", 64) == Scheme(format="int4", group_size=64)


@pytest.mark.parametrize("quantize_head", [True, False])
def test_without_formats_the_head_alone_may_be_rounded(quantize_head: bool) -> None:
    assert formats_of([], None, quantize_head) == [(None, quantize_head)]


def test_each_format_is_there_once_and_only_int4_has_groups() -> None:
    assert formats_of(["int8", AS_IT_IS, "int4", "int8"], 32, True) == [
        (Scheme(format="int8"), True),
        (None, False),
        (Scheme(format="int4", group_size=32), True),
    ]


@pytest.mark.parametrize("quantize", [[], ["int8"], [AS_IT_IS, "fp8"]], ids=str)
def test_group_size_without_groups_is_refused(quantize: list[str]) -> None:
    with pytest.raises(UserError, match=r"group size of 64 .*Give --quantize int4"):
        formats_of(quantize, 64, False)


@pytest.mark.parametrize(
    ("asked", "context", "expected"),
    [(None, 1024, 1024), (None, 8192, 2048), (512, 1024, 512), (4096, 8192, 4096)],
)
def test_windows_are_as_long_as_asked_or_the_smaller_of_2048_and_the_context(
    asked: int | None, context: int, expected: int
) -> None:
    assert resolve_sequence_length(asked, context) == expected


def test_windows_longer_than_the_context_are_refused() -> None:
    with pytest.raises(UserError, match="context of 1024 tokens"):
        resolve_sequence_length(1025, 1024)
