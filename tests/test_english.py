"""One word per thing: no word of our own where the field has one."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "docs", "tests", "tools", "examples", "models")
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
SUFFIXES = {".cu", ".cuh", ".css", ".h", ".html", ".j2", ".json", ".md", ".py", ".svg"}
# The models' own files, and the table below.
SKIPPED = {"tests/test_english.py", "models/py-16m/tokenizer.json"}

# What the field says → what finds the word that it does not.
WORDS = {
    "TileConfig, tile configuration": r"\bCuts?\b(?!-off)|\bcuts\b(?= (of|for) )|_cuts?\b|\bcuts?_",
    "weight row": r"(?<![\w.])_?[Ss]trips?\b|_strips\b",
    "QuantParams": r"\bGrids?\b(?! of)|quantization grid|\bgrid of (codes|a weight)",
    "norm_weight": r"\bGains?\b|_gain\b|\bgain_|(?<!no )\bgain(?=[:=])"
    r"|\bgain (vector|of (the|a) norm)",
    "eps": r"\b[Ee]psilon\b",
    "output_sizes": r"\bwidths\b",
    "sparse_linear, quantized_linear": r"(sparse|quantized|dense)_parts\b",
    "sparse_glu, quantized_glu": r"(sparse|quantized|dense)_gated\b",
    "lm_head_gemv": r"\bdense_rows\b",
    "embed, argmax": r"\bEnds\b|\bcuda_ends\b|\b_?ends_kernel\b|\bends\.(py|cu)\b",
    "BenchmarkModel": r"\b[Ss]ubjects?\b(?! to\b)",
    "baseline": r"\b[Pp]eers?\b",
    "quantized, low-bit": r"\b[Ff]ew[- _]bits?\b|_few_bits|\bfew_bit",
    "tables as an argument": r"\buse_tables\b",
    "kept channels, compaction": r"\bper list\b|\bkept lists?\b|\blists? of kept\b|\bList those\b",
    "a plainer verb": r"\bstands?\b(?! (for|in for|between|with)\b)",
    "a noun first, then what of it": r"^\s+\w+: (Of|As)\b",
}


def lines() -> Iterator[tuple[str, str]]:
    """Yield place and text of every line of sources, docs and tests."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    for path in [*paths, *(ROOT / page for page in PAGES)]:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in SUFFIXES and path.is_file() and name not in SKIPPED:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                yield f"{name}:{number}", line


@pytest.mark.parametrize("better", WORDS)
def test_nothing_is_called_by_a_word_of_our_own(better: str) -> None:
    pattern = re.compile(WORDS[better])
    offenders = [f"{place}: {line.strip()}" for place, line in lines() if pattern.search(line)]
    assert not offenders, f"say {better!r}:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    "text",
    ["line.strip()", "a cut-off in score units", "subject to change", "grid = (blocks,)",
     "no gain: slower", "it ends here", "what it stands for", "the text is cut into windows"],
)  # fmt: skip
def test_plain_english_is_no_word_of_our_own(text: str) -> None:
    assert not [better for better, pattern in WORDS.items() if re.search(pattern, text)]
