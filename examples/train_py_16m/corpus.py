"""The corpus: permissively licensed Python source, cleaned, split, without near-duplicates.

Copyleft packages, vendored copies of them, generated tables and near-duplicates are left out. The
packages in `HELD_OUT` are never trained on: they are the validation text.
"""

import hashlib
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
STANDARD_LIBRARY = "stdlib"
HELD_OUT = frozenset(
    {
        "argparse",
        "asyncio",
        "email",
        "json",
        "networkx",
        "rich",
        "statistics",
        "textwrap",
        "unittest",
    }
)

# Characters taken from any one package.
_PACKAGE_CAP = 15_000_000
_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|0BSD|Unlicense|CC0|Zlib|HPND|Python Software Foundation)\b",
    re.IGNORECASE,
)
_COPYLEFT = re.compile(r"\b(A?L?GPL|GNU|MPL|Mozilla|Proprietary)\b", re.IGNORECASE)
# Its licence text quotes the GPL of a library that its wheels bundle; its sources are BSD.
_PERMISSIVE_ALL_THE_SAME = "scipy"
_SKIPPED = re.compile(
    r"/(site-packages|__pycache__|lib2to3|pydoc_data|encodings|idle_test|turtledemo"
    r"|test_?data|_?generated|inputs|locales?)/"
    r"|/_vendor/(chardet|certifi|rich)/|/config-|_pb2(_grpc)?\.py$"
    r"|/(idnadata|uts46data|entities|_mapping|_\w+_builtins|_emoji_codes|_cell_widths|zipmap)\.py$"
)


@dataclass(frozen=True)
class Document:
    """One source file.

    Attributes:
        package: Distribution it belongs to, "stdlib", or a name in `HELD_OUT`.
        path: Path relative to its library folder.
        text: Its cleaned content.
    """

    package: str
    path: str
    text: str


def collect(
    site_packages: Iterable[Path], rng: random.Random
) -> tuple[list[Document], list[Document]]:
    """Read the standard library and the permissive packages.

    Args:
        site_packages: Folders of installed packages.
        rng: Decides the order, and so which of two near-duplicates stays.

    Returns:
        Training documents and held-out ones.
    """
    documents = [
        Document(package, path, text)
        for package, path, file in _source_files(site_packages)
        if (text := clean(file)) is not None
    ]
    rng.shuffle(documents)
    # Held-out files first, so that copies of them are the ones dropped.
    documents.sort(key=lambda document: document.package not in HELD_OUT)
    kept = _without_duplicates(documents)
    training = [document for document in kept if document.package not in HELD_OUT]
    return training, [document for document in kept if document.package in HELD_OUT]


def clean(file: Path) -> str | None:
    """Return the text of a file, or `None` where it is not ordinary Python source."""
    try:
        text = file.read_text(encoding="utf-8").replace("\f", "").replace(END_OF_TEXT, "")
    except (UnicodeDecodeError, OSError):
        return None
    text = text.expandtabs(4) if "\t" in text else text
    length, lines = len(text), text.split("\n")
    if not 200 <= length <= 300_000 or max(map(len, lines)) > 1000 or length / len(lines) > 90:
        return None
    ascii_length = len(text.encode("ascii", "ignore"))
    words_length = sum(map(len, re.findall(r"[A-Za-z_ \n]+", text)))
    is_prose_like = ascii_length >= 0.995 * length and words_length >= 0.6 * length
    return text if is_prose_like else None


def _source_files(site_packages: Iterable[Path]) -> Iterator[tuple[str, str, Path]]:
    """Yield package, relative path and file: stdlib first, then every permissive package once."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py"), key=str):
        path = file.relative_to(library).as_posix()
        if not _SKIPPED.search(f"/{path}"):
            yield _standard_package(path), path, file
    done: set[str] = set()
    for folder in site_packages:
        for distribution in sorted(distributions(path=[str(folder)]), key=_name_of):
            name = _name_of(distribution).lower().replace("_", "-")
            paths = _python_files(distribution)
            if name in done or not paths or not _is_permissive(distribution, name):
                continue
            done.add(name)
            yield from ((name, path, folder / path) for path in paths)


def _standard_package(path: str) -> str:
    """Return the held-out package that a standard library file or its test belongs to, if any."""
    parts = path.removesuffix(".py").split("/")
    candidates = {parts[0], *(part.removeprefix("test_") for part in (*parts[1:2], parts[-1]))}
    return min(candidates & HELD_OUT, default=STANDARD_LIBRARY)


def _name_of(distribution: Distribution) -> str:
    return distribution.metadata["Name"] or ""


def _python_files(distribution: Distribution) -> list[str]:
    paths = sorted(str(file) for file in distribution.files or [])
    return [
        path
        for path in paths
        if path.endswith(".py") and ".." not in path and not _SKIPPED.search(f"/{path}")
    ]


def _is_permissive(distribution: Distribution, name: str) -> bool:
    metadata = distribution.metadata
    classifiers = metadata.get_all("Classifier") or []
    stated = " ".join(
        [
            metadata.get("License-Expression") or "",
            (metadata.get("License") or "")[:300],
            *(line for line in classifiers if line.startswith("License")),
        ]
    )
    is_copyleft = _COPYLEFT.search(stated) and name != _PERMISSIVE_ALL_THE_SAME
    return bool(_PERMISSIVE.search(stated)) and not is_copyleft


def _without_duplicates(documents: Sequence[Document]) -> list[Document]:
    """Drop files that mostly repeat earlier ones, or that share much with held-out ones."""
    seen: set[bytes] = set()
    held_out: set[bytes] = set()
    size: Counter[str] = Counter()
    kept = []
    for document in documents:
        lines, package = _line_hashes(document.text), document.package
        is_full = size[package] > _PACKAGE_CAP and package != STANDARD_LIBRARY
        if is_full or _share(lines, seen) > 0.7:
            continue
        if package in HELD_OUT:
            held_out.update(lines)
        elif _share(lines, held_out) > 0.3:
            continue
        seen.update(lines)
        size[package] += len(document.text)
        kept.append(document)
    return kept


def _line_hashes(text: str) -> list[bytes]:
    lines = (line.strip() for line in text.split("\n"))
    return [
        hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines if len(line) >= 24
    ]


def _share(lines: Sequence[bytes], known: set[bytes]) -> float:
    return sum(line in known for line in lines) / len(lines) if lines else 0.0
