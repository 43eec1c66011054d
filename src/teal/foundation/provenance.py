"""Where tokens came from, and whether two token streams share text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Two texts share a window when half of the window's fingerprints occur in the other text; a
# licence header or an import block that both quote stays far below.
SHARED_WINDOW = 0.5

_GRAM = 32
_ONE_IN = 16
_BASE = 6364136223846793005
_MIX = -7046029254386353131


@dataclass(frozen=True, kw_only=True, eq=False)
class TextProvenance:
    """The text that token windows were cut from.

    Attributes:
        source: File, data set and split, or another name a reader can find it by.
        sha256: Hash of the whole text, or `None` where the text itself was not at hand.
        offset: First token used.
        num_tokens: Tokens used, from `offset` on.
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
        """Return a JSON form; `fingerprints` travel as a tensor beside it."""
        fields = ("source", "sha256", "offset", "num_tokens", "sequence_length")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], fingerprints: Tensor) -> "TextProvenance":
        """Rebuild from `to_dict` and the fingerprints."""
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

    Which runs are kept depends on their content alone, so a text is recognised at any offset
    (content-defined sampling, as in winnowing).

    Args:
        tokens: Token ids, (num_tokens,), int64.

    Returns:
        Distinct kept hashes, sorted, (about num_tokens / 16,), int64.
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
    """Count the windows that `text` contains, wherever it contains them.

    Args:
        windows: Token ids, (windows, sequence_length), int64.
        text: The other text, with its fingerprints.

    Returns:
        Number of windows of which at least half the fingerprints occur in `text`.
    """
    shared = 0
    for window in windows:
        marks = fingerprint(window)
        if len(marks):
            shared += bool(torch.isin(marks, text.fingerprints).float().mean() >= SHARED_WINDOW)
    return shared
