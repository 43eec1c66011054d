import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teal.foundation.provenance import TextProvenance, fingerprint, shared_windows
from tests.helpers import tiny_tokens

TEXT = torch.randint(0, 32_000, (4096,), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, 32_000, (4096,), generator=torch.Generator().manual_seed(1))


def provenance_of(tokens: torch.Tensor) -> TextProvenance:
    return TextProvenance(
        source="text",
        sha256=None,
        offset=0,
        num_tokens=len(tokens),
        sequence_length=256,
        fingerprints=fingerprint(tokens),
    )


@given(offset=st.integers(0, len(TEXT) - 256))
@settings(max_examples=50, deadline=None)
def test_window_is_found_at_any_offset(offset: int) -> None:
    window = TEXT[offset : offset + 256]
    assert torch.isin(fingerprint(window), fingerprint(TEXT)).all()
    assert shared_windows(window[None], provenance_of(TEXT)) == 1


def test_windows_of_another_text_are_not_found() -> None:
    assert shared_windows(OTHER.view(-1, 256), provenance_of(TEXT)) == 0


def test_only_the_windows_that_a_text_contains_are_counted() -> None:
    windows = torch.stack([TEXT[100:356], OTHER[:256], TEXT[1000:1256]])
    assert shared_windows(windows, provenance_of(TEXT)) == 2


@pytest.mark.parametrize(("quoted", "shared"), [(96, 0), (224, 1)], ids=["header", "most of it"])
def test_a_quotation_counts_only_when_it_is_half_of_the_window(quoted: int, shared: int) -> None:
    window = torch.cat([TEXT[:quoted], OTHER[: 256 - quoted]])
    assert shared_windows(window[None], provenance_of(TEXT)) == shared


def test_one_in_sixteen_runs_is_kept() -> None:
    assert len(fingerprint(TEXT)) == pytest.approx(len(TEXT) / 16, rel=0.2)


def test_fingerprints_are_sorted_and_distinct() -> None:
    marks = fingerprint(torch.cat([TEXT, TEXT]))
    assert (marks.diff() > 0).all()


def test_small_vocabulary_is_sampled_as_well() -> None:
    assert len(fingerprint(tiny_tokens(1, 4096)[0])) == pytest.approx(256, rel=0.2)


@pytest.mark.parametrize("length", [0, 1, 31])
def test_text_shorter_than_a_run_has_no_fingerprint(length: int) -> None:
    marks = fingerprint(TEXT[:length])
    assert marks.shape == (0,)
    assert marks.dtype == torch.int64
    assert shared_windows(TEXT[None, :length], provenance_of(TEXT)) == 0


@pytest.mark.parametrize("sha256", [None, "0" * 64], ids=["without sha256", "with sha256"])
def test_json_form_keeps_everything(sha256: str | None) -> None:
    marks = fingerprint(TEXT)
    text = TextProvenance(
        source="a/b.txt",
        sha256=sha256,
        offset=7,
        num_tokens=64,
        sequence_length=32,
        fingerprints=marks,
    )
    rebuilt = TextProvenance.from_dict(json.loads(json.dumps(text.to_dict())), marks)
    assert rebuilt.to_dict() == text.to_dict()
    assert rebuilt.fingerprints is marks
