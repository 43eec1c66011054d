"""The running interpreter's standard library as text that is always available."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from teal.data import Text, text_of

# Packages that models/py-16m was not trained on.
HELD_OUT = ("argparse", "asyncio", "email", "json", "statistics", "textwrap", "unittest")

_SKIPPED = {
    "__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "dist-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_SHORTEST = 200


def calibration_text() -> Text:
    """Return the standard library without the held-out packages."""
    return text_of(_documents(held_out=False), f"{_library()} without {', '.join(HELD_OUT)}")


def held_out_text() -> Text:
    """Return the held-out packages of the standard library."""
    return text_of(_documents(held_out=True), f"{_library()}: {', '.join(HELD_OUT)}")


def _library() -> str:
    return f"Python {platform.python_version()} standard library"


def _documents(*, held_out: bool) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in _sources(root)
        if (path.parts[0].removesuffix(".py") in HELD_OUT) == held_out
    ]
    # In an order that mixes packages and is the same everywhere.
    for path in sorted(paths, key=_shuffled):
        source = (root / path).read_text(encoding="utf-8", errors="ignore")
        if len(source) >= _SHORTEST:
            yield source


def _sources(root: Path) -> Iterator[Path]:
    """Yield the Python files below `root`, relative to it, without descending into `_SKIPPED`."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            if name.endswith(".py"):
                yield Path(folder, name).relative_to(root)


def _shuffled(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()
