"""Text to fixed-length windows of token ids, with a record of their provenance."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.foundation.errors import MissingExtraError, UserError
from teal.foundation.provenance import TextProvenance, fingerprint, shared_windows

# A text named "hf:NAME:SPLIT" or "hf:NAME:CONFIG:SPLIT" is a data set on the Hugging Face hub.
DATASET_PREFIX = "hf:"

_DATASET_COLUMN = "text"


@dataclass(frozen=True, eq=False)
class Text:
    """Documents of one source.

    Attributes:
        documents: Documents in order, none empty.
        source: File or data set that they come from.
        sha256: Hash of the file's bytes, or of all documents in order.
    """

    documents: tuple[str, ...]
    source: str
    sha256: str


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token ids in windows of equal length.

    Attributes:
        tokens: Token ids, (windows, sequence_length), int64.
        provenance: Text and offset that they come from.
    """

    tokens: Tensor
    provenance: TextProvenance


def read_text(source: str | Path, *, separator: str | None = None) -> Text:
    """Read a text file, or a Hugging Face data set named "hf:NAME[:CONFIG]:SPLIT".

    Args:
        source: Path of a UTF-8 file, or name of a data set, each row of which is a document.
        separator: String that separates the documents of a file, such as "<|endoftext|>".

    Raises:
        UserError: The text is missing, unreadable, not UTF-8, or empty.
    """
    if str(source).startswith(DATASET_PREFIX):
        return text_of(_dataset_rows(str(source)), str(source))
    path = Path(source)
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"Text file {str(path)!r} does not exist. Check the path.") from None
    except OSError as error:
        raise UserError(f"Cannot read text file {str(path)!r}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 text ({error.reason}). Convert it.") from error
    documents = content.split(separator) if separator else [content]
    return Text(_not_empty(documents, str(path)), str(path), hashlib.sha256(raw).hexdigest())


def text_of(documents: Iterable[str], source: str) -> Text:
    """Make a text from documents in memory.

    Args:
        documents: Documents in order; empty ones are left out.
        source: Name to find the text by.

    Raises:
        UserError: All documents are empty.
    """
    kept = _not_empty(documents, source)
    digest = hashlib.sha256()
    for document in kept:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return Text(kept, source, digest.hexdigest())


def token_windows(
    text: Text | str | Path,
    tokenizer: Any,
    *,
    sequence_length: int,
    num_tokens: int | None = None,
    max_tokens: int | None = None,
    offset: int = 0,
) -> TokenWindows:
    """Tokenize a text and split it into windows that do not overlap.

    Documents are separated by the tokenizer's end-of-text token if it has one; no other special
    token is added. Tokens after the last whole window are left out.

    Args:
        text: A text, or a file or data set for `read_text`.
        tokenizer: A Hugging Face tokenizer.
        sequence_length: Tokens per window.
        num_tokens: Required number of tokens, rounded down to whole windows; a shorter text is an
            error.
        max_tokens: Upper limit on the number of tokens, rounded down to whole windows.
        offset: Number of tokens to skip at the start.

    Raises:
        UserError: The text is shorter than one window or than `num_tokens`, or a number is not
            positive.
    """
    _check_lengths(sequence_length, num_tokens, max_tokens, offset)
    if not isinstance(text, Text):
        text = read_text(text, separator=getattr(tokenizer, "eos_token", None))
    limit = num_tokens or max_tokens
    stream = _stream(text, tokenizer, None if limit is None else offset + limit)[offset:]
    if num_tokens is not None and len(stream) < num_tokens:
        raise UserError(
            f"{text.source!r} has {len(stream)} tokens from offset {offset} on, {num_tokens} were "
            f"asked for. Give a longer text or ask for fewer tokens."
        )
    if len(stream) < sequence_length:
        raise UserError(
            f"{text.source!r} has {len(stream)} tokens from offset {offset} on, less than one "
            f"window of {sequence_length}. Give a longer text or a smaller sequence length."
        )
    count = len(stream) // sequence_length
    used = stream[: count * sequence_length]
    provenance = TextProvenance(
        source=text.source,
        sha256=text.sha256,
        offset=offset,
        num_tokens=len(used),
        sequence_length=sequence_length,
        fingerprints=fingerprint(used),
    )
    return TokenWindows(used.view(count, sequence_length), provenance)


def check_no_overlap(windows: TokenWindows, calibration: TextProvenance) -> None:
    """Check that text used for evaluation was not used for calibration.

    Args:
        windows: Text to evaluate on.
        calibration: Provenance of the text that the plan was calibrated on.

    Raises:
        UserError: The texts are overlapping parts of one file, or calibration saw some windows.
    """
    mine = windows.provenance
    same_file = mine.sha256 is not None and mine.sha256 == calibration.sha256
    if same_file and _ranges_meet(mine, calibration):
        reason = "it is the very text that calibrated the plan"
    elif shared := shared_windows(windows.tokens, calibration):
        reason = f"{shared} of its {len(windows.tokens)} windows were used to calibrate the plan"
    else:
        return
    raise UserError(
        f"{mine.source!r} overlaps the calibration text {calibration.source!r}: {reason}. "
        "Evaluate on other text, or insist with --allow-overlap."
    )


def _ranges_meet(one: TextProvenance, other: TextProvenance) -> bool:
    return (
        one.offset < other.offset + other.num_tokens and other.offset < one.offset + one.num_tokens
    )


def _stream(text: Text, tokenizer: Any, limit: int | None) -> Tensor:
    end: int | None = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for index, document in enumerate(text.documents):
        if index and end is not None:
            ids.append(end)
        ids.extend(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.int64)


def _not_empty(documents: Iterable[str], source: str) -> tuple[str, ...]:
    kept = tuple(document for document in documents if document.strip())
    if not kept:
        raise UserError(f"{source!r} is empty. Give a text with words in it.")
    return kept


def _check_lengths(
    sequence_length: int, num_tokens: int | None, max_tokens: int | None, offset: int
) -> None:
    if sequence_length < 2:
        raise UserError(f"Sequence length {sequence_length} is too short. Give at least 2 tokens.")
    if offset < 0:
        raise UserError(f"Offset {offset} is negative. Give the number of tokens to skip.")
    for limit in (num_tokens, max_tokens):
        if limit is not None and limit < sequence_length:
            raise UserError(
                f"{limit} tokens are less than one window of {sequence_length}. "
                "Ask for more tokens or a smaller sequence length."
            )


def _dataset_rows(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # noqa: PLC0415  (an optional package)
    except ImportError as error:
        raise MissingExtraError(f"Text {source!r}", "datasets", "data") from error
    parts = source.removeprefix(DATASET_PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(
            f"Data set {source!r} is not of the form hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."
        )
    *name, split = parts
    try:
        rows = load_dataset(*name, split=split)
        # A row without text is None.
        return (row or "" for row in rows[_DATASET_COLUMN])
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"Cannot read data set {source!r}: {reason} Check name and split."
        ) from error
