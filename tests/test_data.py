import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.data import TokenWindows, check_no_overlap, read_text, text_of, token_windows
from teal.foundation.errors import MissingExtraError, UserError
from teal.foundation.provenance import fingerprint

END = 256


@pytest.fixture
def datasets() -> Any:
    """The optional package of Hugging Face data sets."""
    return pytest.importorskip("datasets")


class Bytes:
    """A tokenizer without a file: one token per byte, and one that ends a document."""

    def __init__(self, eos_token: str | None = "<end>") -> None:
        self.eos_token = eos_token
        self.eos_token_id = None if eos_token is None else END

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


def prose(seed: int, length: int = 2000) -> str:
    letters = torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(seed))
    return bytes(letters.tolist()).decode()


def windows_of(text: str, name: str = "text", **arguments: Any) -> TokenWindows:
    return token_windows(text_of([text], name), Bytes(), sequence_length=200, **arguments)


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_windows_follow_each_other_without_overlap() -> None:
    text = text_of(["abcdefghijk"], "text")
    windows = token_windows(text, Bytes(), sequence_length=4)
    assert windows.tokens.tolist() == [ids("abcd"), ids("efgh")]
    assert windows.tokens.dtype == torch.int64


def test_documents_are_separated_by_the_end_token() -> None:
    text = text_of(["ab", "cd", "e"], "text")
    windows = token_windows(text, Bytes(), sequence_length=7)
    assert windows.tokens.tolist() == [[*ids("ab"), END, *ids("cd"), END, *ids("e")]]


def test_tokenizer_without_an_end_token_joins_documents() -> None:
    windows = token_windows(text_of(["ab", "cd"], "text"), Bytes(None), sequence_length=4)
    assert windows.tokens.tolist() == [ids("abcd")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"offset": 3}, ["defg", "hijk"]),
        ({"num_tokens": 4}, ["abcd"]),
        ({"num_tokens": 7}, ["abcd"]),
        ({"num_tokens": 8, "offset": 2}, ["cdef", "ghij"]),
        ({"max_tokens": 6}, ["abcd"]),
        ({"max_tokens": 100}, ["abcd", "efgh"]),
    ],
    ids=str,
)
def test_offset_and_number_of_tokens_choose_the_windows(
    arguments: dict[str, int], expected: list[str]
) -> None:
    text = text_of(["abcdefghijk"], "text")
    windows = token_windows(text, Bytes(), sequence_length=4, **arguments)
    assert windows.tokens.tolist() == [ids(window) for window in expected]
    provenance = windows.provenance
    assert provenance.offset == arguments.get("offset", 0)
    assert provenance.num_tokens == windows.tokens.numel()
    assert provenance.sequence_length == 4


def test_tokenizing_stops_where_enough_tokens_are_there() -> None:
    seen = []

    class Counting(Bytes):
        def __call__(self, text: str, **arguments: Any) -> dict[str, Any]:
            seen.append(text)
            return super().__call__(text, **arguments)

    text = text_of(["abcd", "efgh", "ijkl"], "text")
    token_windows(text, Counting(), sequence_length=4, num_tokens=4, offset=2)
    assert seen == ["abcd", "efgh"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 12}, "11 tokens from offset 0 on, less than one window of 12.* Give"),
        ({"offset": 9}, "2 tokens from offset 9 on, less than one window of 4.* Give a longer"),
        ({"offset": 100}, "0 tokens from offset 100 on"),
        ({"num_tokens": 12}, "11 tokens from offset 0 on, 12 were asked for.* or ask for fewer"),
        ({"num_tokens": 8, "offset": 5}, "6 tokens from offset 5 on, 8 were asked for"),
        ({"num_tokens": 3}, "^3 tokens are less than one window of 4.* Ask for more"),
        ({"max_tokens": 0}, "^0 tokens are less than one window of 4"),
        ({"sequence_length": 1}, "^Sequence length 1 is too short. Give at least 2"),
        ({"offset": -1}, "^Offset -1 is negative. Give the number"),
    ],
    ids=str,
)
def test_windows_that_the_text_cannot_give_are_refused(
    arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        token_windows(
            text_of(["abcdefghijk"], "text"), Bytes(), **{"sequence_length": 4, **arguments}
        )


def test_file_is_one_text_with_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("grün\r\nblau".encode())
    text = read_text(path)
    assert text.documents == ("grün\r\nblau",)
    assert text.source == str(path)
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_file_is_split_at_the_end_token_of_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab<end><end>cd<end>\n")
    assert read_text(path, separator="<end>").documents == ("ab", "cd")
    windows = token_windows(path, Bytes(), sequence_length=5)
    assert windows.tokens.tolist() == [[*ids("ab"), END, *ids("cd")]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^Text file .* does not exist\. Check the path"),
        (b"", r" is empty\. Give a text"),
        (b" \n\t ", r" is empty\. Give a text"),
        (b"<end>", r" is empty\. Give a text"),
        (b"gr\xfcn", r" is not UTF-8 text \(.*\)\. Convert it"),
    ],
    ids=["missing", "empty", "blank", "no document", "not UTF-8"],
)
def test_file_without_text_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        token_windows(str(path), Bytes(), sequence_length=4)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Cannot read text file .*: Is a directory"):
        read_text(tmp_path)


def test_hash_of_documents_tells_where_they_end() -> None:
    assert text_of(["ab", "c"], "text").sha256 != text_of(["a", "bc"], "text").sha256


@pytest.mark.parametrize("name", ["hf:some/name:train", "hf:some/name:config:train"])
def test_rows_of_a_data_set_are_documents(
    name: str, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*arguments: str, split: str) -> Any:
        asked.append(":".join(["hf", *arguments, split]))
        return datasets.Dataset.from_dict({"text": ["ab", "", "cd"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = read_text(name)
    assert asked == [name]
    assert (text.documents, text.source) == (("ab", "cd"), name)


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf::train", "hf:name:", "hf:a:b:c:d"])
def test_data_set_without_name_and_split_is_refused(name: str, datasets: Any) -> None:
    with pytest.raises(UserError, match="is not of the form hf:NAME:SPLIT or hf:NAME:CONFIG:SPL"):
        read_text(name)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [({"story": ["ab"]}, "text"), (None, "no such set"), ({"text": [None]}, "")],
    ids=["no text column", "missing", "rows without text"],
)
def test_data_set_that_cannot_be_read_is_refused(
    columns: dict[str, list[str]] | None,
    reason: str,
    datasets: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, *, split: str) -> Any:
        if columns is None:
            raise FileNotFoundError("no such set\nin detail")
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=f"^(Cannot read data set )?'hf:name:train'.*{reason}"):
        read_text("hf:name:train")


def test_missing_datasets_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'teal\[data\]'"):
        read_text("hf:name:train")


def test_the_same_part_of_a_file_overlaps() -> None:
    windows = windows_of(prose(0))
    with pytest.raises(UserError, match=r"it is the very text .* insist with --allow-overlap"):
        check_no_overlap(windows, windows.provenance)


def test_two_parts_of_one_file_do_not_overlap() -> None:
    calibration = windows_of(prose(0), num_tokens=1000)
    check_no_overlap(windows_of(prose(0), offset=1000), calibration.provenance)


def test_parts_of_one_file_that_share_one_token_overlap() -> None:
    calibration = windows_of(prose(0), num_tokens=1000)
    with pytest.raises(UserError, match="the very text"):
        check_no_overlap(windows_of(prose(0), offset=999), calibration.provenance)


def test_shifted_copy_in_another_file_overlaps() -> None:
    calibration = windows_of(prose(0), "train")
    copy = windows_of(prose(1, 137) + prose(0)[:600] + prose(2, 500), "test")
    with pytest.raises(UserError, match=r"'test' overlaps .* 'train': 3 of its 6 windows were"):
        check_no_overlap(copy, calibration.provenance)


def test_licence_header_that_two_files_share_is_no_overlap() -> None:
    licence = prose(9, 80)
    calibration = windows_of(licence + prose(0))
    other = windows_of(licence + prose(1))
    assert torch.isin(fingerprint(other.tokens[0]), calibration.provenance.fingerprints).any()
    check_no_overlap(other, calibration.provenance)


def test_text_without_a_hash_is_compared_by_its_windows() -> None:
    windows = windows_of(prose(0))
    unnamed = TokenWindows(windows.tokens, windows_of(prose(1)).provenance)
    with pytest.raises(UserError, match="10 of its 10 windows"):
        check_no_overlap(unnamed, windows.provenance)


def test_strings_become_a_text_without_empty_documents() -> None:
    text = text_of(iter(["", "ab", " "]), "memory")
    assert (text.documents, text.source) == (("ab",), "memory")
