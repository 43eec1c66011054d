"""The provenance of tokens, and a test for text shared by two token streams."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A text contains a window if it has half of the window's fingerprints; a licence header or an
# import block that both texts quote stays far below that.
SHARED_WINDOW = 0.5

_GRAM = 32
_ONE_IN = 16
_BASE = 6364136223846793005
_MIX = -7046029254386353131


@dataclass(frozen=True, kw_only=True, eq=False)
class TextProvenance:
    """The text that token windows come from.

    Attributes:
        source: File, data set and split, or another name to find the text by.
        sha256: Hash of the whole text, or `None` if only its tokens were available.
        offset: Index of the first token used.
        num_tokens: Number of tokens used, from `offset` on.
        sequence_length: Tokens per window.
        fingerprints: Sampled hashes of the token runs used, (number,), int64, sorted.
    """

    source: str
    sha256: str | None
    offset: int
    num_tokens: int
    sequence_length: int
    fingerprints: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form without `fingerprints`, which are stored as a tensor."""
        fields = ("source", "sha256", "offset", "num_tokens", "sequence_length")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], fingerprints: Tensor) -> "TextProvenance":
        """Rebuild a provenance from `to_dict` and its fingerprints."""
        return cls(
            source=str(content["source"]),
            sha256=None if content["sha256"] is None else str(content["sha256"]),
            offset=int(content["offset"]),
            num_tokens=int(content["num_tokens"]),
            sequence_length=int(content["sequence_length"]),
            fingerprints=fingerprints,
        )


def fingerprint(tokens: Tensor) -> Tensor:
    """Hash every run of 32 tokens and keep the hashes that are divisible by 16.

    Sampling depends on the content of a run alone, so a text is recognised at any offset (as in
    winnowing).

    Args:
        tokens: Token ids, (num_tokens,), int64.

    Returns:
        Distinct sampled hashes, sorted, (about num_tokens / 16,), int64.
    """
    if len(tokens) < _GRAM:
        return torch.empty(0, dtype=torch.int64)
    powers = torch.ones(_GRAM, dtype=torch.int64)
    for i in range(1, _GRAM):
        powers[i] = powers[i - 1] * _BASE
    hashes = (tokens.cpu().unfold(0, _GRAM, 1) * powers).sum(-1)
    hashes = (hashes ^ (hashes >> 29)) * _MIX
    hashes = hashes ^ (hashes >> 32)
    kept: Tensor = torch.unique(hashes[hashes % _ONE_IN == 0])
    return kept


def shared_windows(windows: Tensor, text: TextProvenance) -> int:
    """Count the windows that `text` contains, at any offset.

    Args:
        windows: Token ids, (windows, sequence_length), int64.
        text: Provenance of the other text, with its fingerprints.

    Returns:
        Number of windows that have at least half of their fingerprints in `text`.
    """
    shared = 0
    for window in windows:
        marks = fingerprint(window)
        if len(marks):
            shared += bool(torch.isin(marks, text.fingerprints).float().mean() >= SHARED_WINDOW)
    return shared
