"""What the verbs share for output: tables, JSON, progress bars, and quiet libraries."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

Item = TypeVar("Item")

_REPORT_AFTER = 2.0
# Width of a table, in characters, where stdout is not a terminal.
_FILE_WIDTH = 120


def progress_bar(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield `items` behind a progress bar; none where stderr is not a terminal."""
    return iter(tqdm(items, desc=description, disable=None, leave=False, delay=_REPORT_AFTER))


def print_json(content: Any) -> None:
    """Print `content` as JSON, alone on stdout."""
    print(json.dumps(content, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(table)


def say(message: str) -> None:
    """Print a line as it is, without markup or wrapping."""
    Console(highlight=False, soft_wrap=True, emoji=False).print(message, markup=False)


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of Hugging Face libraries."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
